"""The random numbers that a module starts with."""

from __future__ import annotations

import jax
from flax import nnx


class _Stream(nnx.RngStream):
    def __call__(self) -> jax.Array:
        key = jax.random.fold_in(self.key[...], self.count[...])
        self.count.set_value(self.count[...] + 1)
        return key


class ModuleRngs(nnx.Rngs):
    """`nnx.Rngs(seed)`, the same keys in the same order, for modules that are made inside a traced function.

    There flax asks each counter where it lies, to which JAX answers with an error that prints the function as it was
    traced so far: a whole autoencoder took a second instead of a fifth.
    """

    def __init__(self, seed: int | jax.Array):
        self.default = _Stream(jax.random.key(seed) if isinstance(seed, int) else seed, tag="default")
