"""What training needs on each device: against arrays that are really there, and the published model's sizes."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from launch.fit_training import Need, abstract_model, activations, fused, needs, placed, table
from osjax import leaves
from osjax.models.mmdit import MMDiT, MMDiTConfig
from osjax.parallel.local_attention import attend_locally
from osjax.parallel.mesh import TrainingMeshShape, make_mesh
from osjax.sampling.geometry import image_size, latent_grid
from osjax.sampling.latents import Text
from osjax.training.flow import Clean, Draw, flow_loss
from osjax.training.options import OptimOptions
from osjax.training.state import abstract_start, make_step, start

TINY = MMDiTConfig(hidden_size=64, num_heads=2, depth=2, depth_single_blocks=2, axes_dim=(8, 12, 12))
TINY_GRID = latent_grid(32, 48, 17)
FULL_GRID = latent_grid(*image_size("256px", "16:9"), 129)
PARAMETERS = 11.891e9
GB = 1e9


def test_state_is_what_a_device_holds():
    mesh = make_mesh(TrainingMeshShape(fsdp=8))
    weights = {f"mmdit.{name}": array for name, array in leaves.flatten(MMDiT(TINY, rngs=nnx.Rngs(0))).items()}
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract_start(weights, OptimOptions(), 1000, mesh))
    begin = jax.jit(lambda weights: start(weights, OptimOptions(), 1000), out_shardings=shardings)
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(begin(weights)))
    assert needs(TINY, TINY_GRID, 8, rank=0).state == pytest.approx(held / GB, rel=1e-9)


def test_the_published_model_at_full_size():
    on = {fsdp: needs(MMDiTConfig(), FULL_GRID, fsdp, rank=0) for fsdp in (1, 4, 8)}
    assert on[1].state == pytest.approx(4 * 4 * PARAMETERS / GB, rel=1e-4)  # four float32 numbers a parameter
    assert on[1].copies == pytest.approx(2 * 2 * PARAMETERS / GB, rel=1e-4)
    # Nothing large stays whole: eight devices hold an eighth each, and a per mille of vectors.
    assert on[8].state == pytest.approx(on[1].state / 8, rel=2e-3)
    assert on[1].verdict(80).startswith("no")
    assert on[4].verdict(80).startswith("no")
    assert on[8].verdict(80).startswith("yes")


def test_a_lora_at_full_size_fits_one_device():
    need = needs(MMDiTConfig(), FULL_GRID, 1, rank=32)
    assert need.verdict(80).startswith("yes")
    assert need.state < 2
    assert need.copies == 0
    assert need.frozen > 2 * PARAMETERS / GB


def test_kept_is_what_enters_the_blocks():
    kept, block = activations(MMDiTConfig(), FULL_GRID, jnp.bfloat16)
    deeper = dataclasses.replace(MMDiTConfig(), depth_single_blocks=39)
    tokens = FULL_GRID.tokens + 512
    assert activations(deeper, FULL_GRID, jnp.bfloat16)[0] - kept == pytest.approx(2 * tokens * 3072 / GB)
    # Of a block at least its hidden MLP features stand, before and after their activation.
    assert block > 2 * 2 * tokens * 4 * 3072 / GB


def test_verdicts_and_table():
    need = Need(state=40, gradients=10, copies=10, frozen=5, kept=3, block=2)
    assert need.verdict(80) == "yes, 10.0 to spare"
    assert need.verdict(64) == "no: 6.0 too much; state takes 40.0"
    *_, one, eight = table(TINY, TINY_GRID, (1, 8), 0, 80).splitlines()
    assert one.startswith("| 1 |")
    assert eight.startswith("| 8 |")
    assert eight.endswith("to spare |")


def planned_gb(mesh: Mesh) -> float:
    """What the compiler plans for a step of the tiny model in float32, a clip a device, arguments and all."""
    model = abstract_model(MMDiT, TINY, jnp.float32)
    state = abstract_start(placed("mmdit", leaves.flatten(model), mesh), OptimOptions(), 1000, mesh)
    attention = attend_locally(fused, mesh)

    def rows(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((mesh.size, *shape), jnp.float32, sharding=NamedSharding(mesh, P("fsdp")))

    def loss(trained, frozen, batch, key):
        weights = {name.removeprefix("mmdit."): array for name, array in trained.items()}
        return flow_loss(leaves.unflatten(model, weights), *batch, attention, remat=True)[0], {}

    _, *z = TINY_GRID.noise_shape(TINY.latent_channels)
    clean = Clean(rows(*z), rows(*z[:-1], 1), rows(*z))
    batch = clean, Text(rows(512, 4096), rows(768)), Draw(rows(), rows(TINY_GRID.tokens, TINY.in_channels))
    step = make_step(loss, OptimOptions(), 1000, jax.random.key(0), jax.tree.map(lambda leaf: leaf.sharding, state))
    compiled = jax.jit(lambda state, batch: step(state, {}, [batch]), donate_argnums=0).lower(state, batch).compile()
    plan = compiled.memory_analysis()
    return (plan.argument_size_in_bytes + plan.temp_size_in_bytes) / GB


def test_the_total_bounds_what_the_compiler_plans():
    need = needs(TINY, TINY_GRID, 8, rank=0, dtype=jnp.float32)
    share = planned_gb(make_mesh(TrainingMeshShape(fsdp=8))) / (need.total - need.frozen)
    assert 0.5 < share < 1, share
