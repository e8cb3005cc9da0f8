"""Modules get from ModuleRngs what they would get from flax's own."""

import jax
import numpy as np
import pytest
from flax import nnx

from osjax.models.layers import stack_blocks
from osjax.models.rngs import ModuleRngs


def make(rngs):
    """Two layers, and three stacked ones."""
    single = [nnx.Linear(3, 4, rngs=rngs), nnx.Linear(4, 3, rngs=rngs)]
    return nnx.List([*single, stack_blocks(lambda rngs: nnx.Linear(3, 3, rngs=rngs), 3, rngs)])


@pytest.mark.parametrize("seed", [0, 7])
def test_weights_are_those_of_flax(seed):
    ours, theirs = (jax.tree.leaves(make(rngs)) for rngs in (ModuleRngs(seed), nnx.Rngs(seed)))
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one, other)


def test_traced_weights_are_those_of_flax():
    ours, theirs = (
        jax.tree.leaves(jax.jit(lambda kind=kind: make(kind(jax.random.key(3))))()) for kind in (ModuleRngs, nnx.Rngs)
    )
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one, other)


def test_every_draw_differs():
    rngs = ModuleRngs(0)
    keys = {tuple(jax.random.key_data(rngs.params()).tolist()) for _ in range(5)}
    assert len(keys) == 5
