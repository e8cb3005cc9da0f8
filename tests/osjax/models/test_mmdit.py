"""The backward pass of the MMDiT: what is kept for it. `tests/osjax/training/test_remat.py` compares the gradients."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from osjax.kernels.attention_ref import reference_attention
from osjax.models.mmdit import MMDiT, MMDiTConfig, Remat
from osjax.models.rope import rope_table

MICRO = MMDiTConfig(
    in_channels=8,
    vec_in_dim=8,
    context_in_dim=8,
    hidden_size=32,
    num_heads=2,
    depth=2,
    depth_single_blocks=3,
    axes_dim=(4, 6, 6),
    cond_embed=False,
)
BATCH, IMAGE, TEXT = 2, 35, 11  # tokens: no other size in the model is 35, 11 or 46


def products(operation, *_, **__) -> bool:
    """A policy: what matrix products computed is kept."""
    return operation.name == "dot_general"


def score(model: MMDiT, remat: Remat) -> jax.Array:
    """A number that depends on every weight."""
    sizes = ((BATCH, IMAGE, 8), (BATCH, TEXT, 8), (BATCH, 8))
    img, txt, vec = (jax.random.normal(jax.random.key(len(size)), size) for size in sizes)
    rope = rope_table(np.indices((1, 5, 7)).reshape(3, -1).T[None], MICRO.axes_dim, MICRO.theta)
    return jnp.square(model(img, txt, vec, jnp.full(BATCH, 0.3), rope, reference_attention, remat=remat)).mean()


def kept(model: MMDiT, remat: Remat) -> int:
    """How many numbers that belong to tokens the forward pass hands to the backward pass."""
    backward = jax.eval_shape(lambda model: jax.vjp(lambda model: score(model, remat), model)[1], model)
    tokens = {IMAGE, TEXT, IMAGE + TEXT}
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(backward) if tokens & set(leaf.shape))


def test_recomputed_blocks_keep_what_enters_them_and_no_more():
    deeper = dataclasses.replace(MICRO, depth=MICRO.depth + 1, depth_single_blocks=MICRO.depth_single_blocks + 1)
    models = [nnx.eval_shape(lambda c=config: MMDiT(c, rngs=nnx.Rngs(0))) for config in (MICRO, deeper)]
    less, more = (kept(model, True) for model in models)
    assert more - less == 2 * BATCH * (IMAGE + TEXT) * MICRO.hidden_size
    assert more < kept(models[1], products) < kept(models[1], False)
