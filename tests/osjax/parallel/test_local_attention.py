"""Attention cut over a training mesh: the same numbers and gradients; and what it makes of weights cut over `fsdp`."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from osjax import leaves
from osjax.kernels.attention_ref import reference_attention
from osjax.models.mmdit import MMDiT, MMDiTConfig
from osjax.models.rope import rope_table
from osjax.parallel.local_attention import attend_locally
from osjax.parallel.mesh import TrainingMeshShape, make_mesh
from osjax.parallel.weights import weight_spec

MICRO = MMDiTConfig(
    in_channels=8, vec_in_dim=8, context_in_dim=8, hidden_size=48, num_heads=2, depth=2, depth_single_blocks=2,
    axes_dim=(8, 8, 8), cond_embed=False,
)  # fmt: skip
BATCH, IMAGE, TEXT = 8, 20, 3
TOKENS = IMAGE + TEXT  # 20 and 23: no other size in the model
ROUNDING = 1e-5  # float32 sums of some twenty terms in another order, relative to the largest value


@pytest.mark.parametrize("shape", [(8, 1, 1), (2, 2, 2), (1, 2, 4)], ids=str)
def test_numbers_and_gradients_are_those_of_one_device(shape):
    qkv = jax.random.normal(jax.random.key(0), (3, BATCH, TOKENS, 2, 8))

    def score(qkv, attention):
        out = attention(*qkv)
        return (out * jnp.cos(jnp.arange(out.size).reshape(out.shape))).sum(), out

    run = jax.jit(jax.grad(score, has_aux=True), static_argnums=1)
    local = attend_locally(reference_attention, make_mesh(TrainingMeshShape(*shape)))
    # Two heads do not divide over tensor=4: there they stay whole.
    for found, expected in zip(run(qkv, local), run(qkv, reference_attention), strict=True):
        np.testing.assert_allclose(found, expected, atol=ROUNDING * float(jnp.abs(expected).max()), rtol=0)


def abstract(shape: tuple[int, ...], sharding: NamedSharding) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, jnp.float32, sharding=sharding)


def shapes_of(kinds: str, program: str) -> set[tuple[int, ...]]:
    """Shapes of all that devices tell each other by those operations of a compiled program."""
    told = re.findall(rf"= (.+?) (?:{kinds})(?:-start)?\(", program)
    return {tuple(map(int, shape.split(","))) for shapes in told for shape in re.findall(r"\w\[([\d,]+)\]", shapes)}


def test_weights_are_gathered_block_by_block_and_activations_stay_where_they_are():
    mesh = make_mesh(TrainingMeshShape(fsdp=8))
    attention = attend_locally(reference_attention, mesh)
    rope = rope_table(np.indices((1, 4, 5)).reshape(3, -1).T[None], MICRO.axes_dim, MICRO.theta)
    model = nnx.eval_shape(lambda: MMDiT(MICRO, rngs=nnx.Rngs(0)))
    weights = {
        name: abstract(leaf.shape, NamedSharding(mesh, weight_spec(name, leaf.shape, mesh)))
        for name, leaf in leaves.flatten(model).items()
    }
    rows = NamedSharding(mesh, P(("data", "fsdp")))
    inputs = [abstract(shape, rows) for shape in ((BATCH, IMAGE, 8), (BATCH, TEXT, 8), (BATCH, 8), (BATCH,))]

    def loss(model: MMDiT, inputs: list[jax.Array]) -> jax.Array:
        return jnp.square(model(*inputs, rope, attention, remat=True)).mean()

    program = jax.jit(jax.grad(loss)).lower(leaves.unflatten(model, weights), inputs).compile().as_text()
    gathered, moved = shapes_of("all-gather", program), shapes_of("all-reduce|reduce-scatter|all-to-all", program)
    assert not [shape for shape in gathered | moved if {IMAGE, TOKENS} & set(shape)]  # nothing that has tokens
    width, mlp = MICRO.hidden_size, MICRO.mlp_hidden
    assert {(width, mlp), (1, width, mlp)} & gathered
    assert (MICRO.depth, width, mlp) not in gathered  # never the whole stack at a time
