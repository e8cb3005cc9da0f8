"""Small layers shared by the transformer blocks.

B batch, N tokens, C channels, F features, H heads, D head width.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx


def timestep_embedding(t_b: jax.Array, width: int = 256, max_period: float = 10_000.0) -> jax.Array:
    """Sinusoidal embedding of t · 1000: cosines first, then sines (DDPM's embedding, Ho et al. 2020, in FLUX's order).

    t [B] in [0, 1] (or a guidance scale) → float32 [B, width]; width is even.
    """
    half = width // 2
    frequencies = jnp.exp(-math.log(max_period) * jnp.arange(half, dtype=jnp.float32) / half)
    angles_bf = t_b.astype(jnp.float32)[:, None] * 1000.0 * frequencies
    return jnp.concatenate([jnp.cos(angles_bf), jnp.sin(angles_bf)], axis=-1)


def layer_norm(x: jax.Array, epsilon: float = 1e-6) -> jax.Array:
    """LayerNorm without affine over the last axis, float32 in and out of the statistics; returns float32."""
    x = x.astype(jnp.float32)
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred * jax.lax.rsqrt(jnp.square(centred).mean(axis=-1, keepdims=True) + epsilon)


def in_range(x: jax.Array) -> jax.Array:
    """What left the range of float16 is brought back to its end, as diffusers does; other types pass as they are."""
    if x.dtype != jnp.float16:
        return x
    largest = float(jnp.finfo(jnp.float16).max)
    return jnp.clip(x, -largest, largest)


class RMSNorm(nnx.Module):
    """x / rms(x) · scale over the last axis; statistics in float32, the scale applied after the cast back."""

    def __init__(self, width: int, *, rngs: nnx.Rngs, dtype: jnp.dtype, epsilon: float = 1e-6):
        self.scale = nnx.Param(jnp.ones((width,), dtype))
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.square(x32).mean(axis=-1, keepdims=True) + self.epsilon)
        return normed.astype(x.dtype) * self.scale[...]


class MLPEmbedder(nnx.Module):
    """linear → SiLU → linear: conditioning vectors into the hidden width. [B, C] → [B, F]."""

    def __init__(self, inputs: int, hidden: int, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.in_layer = nnx.Linear(inputs, hidden, rngs=rngs, dtype=dtype, param_dtype=dtype)
        self.out_layer = nnx.Linear(hidden, hidden, rngs=rngs, dtype=dtype, param_dtype=dtype)

    def __call__(self, x_bc: jax.Array) -> jax.Array:
        return self.out_layer(jax.nn.silu(self.in_layer(x_bc)))


class Embed(nnx.Embed):
    """Rows of a table, by their numbers. Its gradient is a product with one-hot rows.

    The usual one scatters every token's gradient onto its row: where thousands of tokens share a few rows, as padding
    does, they wait for each other (two thirds of a training step, measured), and are summed in an order that changes.
    """

    def __call__(self, ids: jax.Array) -> jax.Array:
        """int32 [...] → `dtype` [..., F]."""
        return _rows(self.embedding[...].astype(self.dtype), ids)


@jax.custom_vjp
def _rows(table_vf: jax.Array, ids: jax.Array) -> jax.Array:
    return jnp.take(table_vf, ids, axis=0)


def _rows_forward(table_vf: jax.Array, ids: jax.Array) -> tuple[jax.Array, tuple[jax.Array, int]]:
    return _rows(table_vf, ids), (ids, len(table_vf))


def _rows_backward(kept: tuple[jax.Array, int], gradient: jax.Array) -> tuple[jax.Array, None]:
    ids, count = kept
    one_hot = jax.nn.one_hot(ids, count, dtype=gradient.dtype)
    table_vf = jnp.einsum("...v,...f->vf", one_hot, gradient, preferred_element_type=jnp.float32)
    return table_vf.astype(gradient.dtype), None


_rows.defvjp(_rows_forward, _rows_backward)


def stack_blocks(make: Callable[..., nnx.Module], count: int, rngs: nnx.Rngs) -> nnx.Module:
    """`count` blocks as one module whose parameters carry a leading layer axis, for `jax.lax.scan`.

    `make(rngs=rngs)` builds one block; each layer draws from its own part of the rngs.
    """
    return nnx.vmap(lambda rngs: make(rngs=rngs), in_axes=(0,), out_axes=0)(rngs.split(count))
