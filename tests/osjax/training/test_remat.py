"""What is kept for the backward pass, by option, of blocks of one width; the gradient is the same whatever is kept."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from osjax.kernels.attention_ref import reference_attention
from osjax.models import lora
from osjax.models.mmdit import MMDiT, MMDiTConfig
from osjax.models.rope import rope_table
from osjax.training.options import REMAT
from osjax.training.remat import FEW_CHANNELS, POLICIES

WIDE = MMDiTConfig(
    in_channels=8, vec_in_dim=8, context_in_dim=8, hidden_size=2 * FEW_CHANNELS, num_heads=2, depth=1,
    depth_single_blocks=1, axes_dim=(32, 48, 48), patch_size=1,
)  # fmt: skip
IMAGE, TEXT = 12, 5
# The same float32 operations, which the compiler may order otherwise: some ten roundings of 6e-8, of the largest value.
ROUNDING = 2e-6


@pytest.fixture(scope="module")
def model():
    return MMDiT(WIDE, rngs=nnx.Rngs(0))


def score(model, name):
    """A number that depends on every weight."""
    img, txt, vec = (
        jax.random.normal(jax.random.key(len(size)), size) for size in ((1, IMAGE, 8), (1, TEXT, 8), (1, 8))
    )
    cond = jnp.zeros((1, IMAGE, WIDE.cond_channels))
    rope = rope_table(np.indices((1, 3, 4)).reshape(3, -1).T[None], WIDE.axes_dim, WIDE.theta)
    velocity = model(img, txt, vec, jnp.full(1, 0.3), rope, reference_attention, cond, remat=POLICIES[name])
    return jnp.square(velocity).mean()


def kept(model, name):
    """How many numbers that belong to tokens the forward pass hands to the backward pass."""
    backward = jax.eval_shape(lambda model: jax.vjp(lambda model: score(model, name), model)[1], model)
    tokens = {IMAGE, TEXT, IMAGE + TEXT}
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(backward) if tokens & set(leaf.shape))


def test_every_option_has_its_policy():
    assert tuple(POLICIES) == REMAT


@pytest.mark.parametrize("name", REMAT[:-1])
def test_the_gradient_is_the_same(model, name):
    run = jax.jit(jax.grad(score), static_argnums=1)
    for found, expected in zip(jax.tree.leaves(run(model, name)), jax.tree.leaves(run(model, "nothing")), strict=True):
        np.testing.assert_allclose(found, expected, atol=ROUNDING * float(jnp.abs(expected).max()), rtol=0)


def test_each_keeps_more_than_the_one_before(model):
    """Plain attention, unlike cuDNN's, is computed again with the blocks."""
    blocks, products, elementwise, nothing = (kept(model, name) for name in REMAT)
    assert blocks == products < elementwise < nothing / 2


def test_of_an_adapter_only_the_narrow_side_is_kept(model):
    """Four projections of either stream, three of the joint one."""
    rank = 4
    adapter = lora.init(model, rank, 4.0, ("qkv.lin", "proj", "mlp_in", "mlp_out", "out"), jax.random.key(0))
    more = kept(lora.attach(model, adapter), "elementwise") - kept(model, "elementwise")
    assert more == rank * (4 + 3) * (IMAGE + TEXT)
