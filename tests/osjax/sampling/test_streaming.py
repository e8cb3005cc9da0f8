"""Block by block from host memory it is the same as all at once: on every mesh, with cached steps, in 8 bits."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding

from osjax.models.mmdit import MMDiT
from osjax.models.quantized import quantize
from osjax.models.streamed import Layers, StreamedMMDiT, cut
from osjax.parallel.host_memory import to_devices, to_host
from osjax.parallel.mesh import MeshShape, make_mesh
from osjax.parallel.specs import SPECS
from osjax.sampling.caching import Reuse
from osjax.sampling.denoise import denoise
from tests.osjax.sampling.test_denoise import CONFIG, problem, where

# The same float32 operations, in other fusions: a few units in the last place of velocities of about 1, over 3 steps.
CLOSE = {"rtol": 2e-5, "atol": 2e-5}


@pytest.fixture(scope="module")
def model() -> MMDiT:
    return MMDiT(CONFIG, rngs=nnx.Rngs(3))


class Counting:
    """Takes blocks to the devices, and counts them."""

    def __init__(self, sharding):
        self.sharding, self.count = sharding, 0

    def __call__(self, block):
        self.count += 1
        return to_devices(block, self.sharding)


def streamed(model: MMDiT, **shape: int) -> StreamedMMDiT:
    sharding = NamedSharding(make_mesh(MeshShape(**shape)), SPECS.everywhere)
    rest, double, single = cut(model)
    layers = Layers(jax.device_put(rest, sharding), to_host(double), to_host(single))
    return StreamedMMDiT(layers, Counting(sharding))


@pytest.mark.parametrize("shape", [{}, {"seq": 2}, {"data": 2, "seq": 4}, {"data": 8}])
@pytest.mark.parametrize("batch", [1, 3])
def test_it_draws_the_same(model, shape, batch):
    wanted, passes = denoise(model, *problem(batch), where(**shape))
    found, as_many = denoise(streamed(model, **shape), *problem(batch), where(**shape))
    np.testing.assert_allclose(found, wanted, **CLOSE)
    assert as_many == passes == 6


@pytest.mark.parametrize(("limit", "in_full"), [(0.0, 6), (0.9, 5), (1.1, 4), (10.0, 3)])
@pytest.mark.parametrize("shape", [{}, {"data": 2, "seq": 2}])
def test_cut_passes_are_the_same(model, shape, limit, in_full):
    reuse = Reuse(0.0, np.inf, limit)
    wanted, passes = denoise(model, *problem(3), where(**shape), reuse=reuse)
    parts = streamed(model, **shape)
    found, as_many = denoise(parts, *problem(3), where(**shape), reuse=reuse)
    np.testing.assert_allclose(found, wanted, **CLOSE)
    assert as_many == passes == in_full


@pytest.mark.parametrize("precision", ["fp8", "int8"])
def test_blocks_may_have_8_bits(model, precision):
    small = quantize(model, precision)
    wanted, _ = denoise(small, *problem(1), where())
    found, _ = denoise(streamed(small), *problem(1), where())
    # fp8 rounds activations, whose last bits decide between neighbours 1/8 apart: rarely, and each weighs little.
    close = {"rtol": 0, "atol": 0.02} if precision == "fp8" else CLOSE
    np.testing.assert_allclose(found, wanted, **close)


@pytest.mark.parametrize("reuse", [None, Reuse(0.0, np.inf, 0.9)])
def test_blocks_that_are_all_there_draw_what_those_that_come_do_to_the_bit(model, reuse):
    """The same programs."""
    parts = streamed(model, seq=2)
    there = StreamedMMDiT(to_devices(parts.layers, parts.bring.sharding))
    wanted, _ = denoise(parts, *problem(1), where(seq=2), reuse=reuse)
    found, _ = denoise(there, *problem(1), where(seq=2), reuse=reuse)
    np.testing.assert_array_equal(found, wanted)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(there.resident))


def test_a_block_comes_once_a_step_for_all_branches(model):
    parts = streamed(model)
    denoise(parts, *problem(1), where())
    assert parts.bring.count == 3 * parts.depth + 1  # and the first once more, for a step that did not follow


def test_a_model_that_is_told_its_guidance(model):
    config = dataclasses.replace(CONFIG, guidance_embed=True, cond_embed=False)
    model, told = MMDiT(config, rngs=nnx.Rngs(4)), jnp.full(1, 4.0)
    wanted, _ = denoise(model, *problem(1, config), where(), guidance_b=told)
    found, _ = denoise(streamed(model), *problem(1, config), where(), guidance_b=told)
    np.testing.assert_allclose(found, wanted, **CLOSE)
