"""How weights lie over a training mesh: every spec fits its shape, and what is large is cut."""

import functools
import math

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import NamedSharding

from osjax import leaves
from osjax.models import lora
from osjax.parallel.mesh import TrainingMeshShape, make_mesh
from osjax.parallel.weights import weight_spec
from osjax.residency import MODELS

STACKS = ("double_blocks.", "single_blocks.", "blocks.")
MESHES = [
    TrainingMeshShape(data, fsdp, tensor)
    for data in range(1, 9)
    for fsdp in range(1, 9)
    for tensor in range(1, 9)
    if data * fsdp * tensor <= 8
]
meshes = st.sampled_from(MESHES).map(make_mesh)


@functools.cache
def full_size(kind):
    """Leaf name → abstract float32 array of the published model."""
    model_class, config_class = MODELS[kind]
    return leaves.flatten(nnx.eval_shape(lambda: model_class(config_class(), rngs=nnx.Rngs(0), dtype=jnp.float32)))


NAMES = sorted({f"{kind}.{name}" for kind in MODELS for name in full_size(kind)})


def assert_fits(name, shape, mesh):
    spec = weight_spec(name, shape, mesh)
    axes = [axis for axis in spec if axis is not None]
    assert len(set(axes)) == len(axes)
    assert set(axes) <= {"fsdp", "tensor"}
    # The sharding refuses a spec that does not divide the shape.
    assert math.prod(NamedSharding(mesh, spec).shard_shape(shape)) * math.prod(
        mesh.shape[axis] for axis in axes
    ) == math.prod(shape)


@given(
    name=st.sampled_from(NAMES) | st.text(max_size=8),
    shape=st.lists(st.integers(1, 12), max_size=6).map(tuple),
    mesh=meshes,
)
def test_any_mesh_takes_any_weight(name, shape, mesh):
    assert_fits(name, shape, mesh)


@pytest.mark.parametrize("kind", MODELS)
def test_every_weight_of_the_published_models_fits(kind):
    for mesh in (make_mesh(TrainingMeshShape(fsdp=8)), make_mesh(TrainingMeshShape(2, 2, 2))):
        for name, array in full_size(kind).items():
            assert_fits(f"{kind}.{name}", array.shape, mesh)


@pytest.mark.parametrize("kind", ["mmdit", "t5", "clip"])
def test_layers_are_never_cut(kind):
    """A scan takes one layer after another: each would have to be sent around."""
    mesh = make_mesh(TrainingMeshShape(fsdp=2, tensor=2))
    stacked = {name: array for name, array in full_size(kind).items() if name.startswith(STACKS)}
    assert stacked
    cut = [name for name, array in stacked.items() if weight_spec(f"{kind}.{name}", array.shape, mesh)[0] is not None]
    assert cut == []


@pytest.mark.parametrize(("fsdp", "tensor"), [(8, 1), (4, 2), (2, 4)])
def test_nearly_all_of_the_full_mmdit_is_cut_by_fsdp(fsdp, tensor):
    mesh = make_mesh(TrainingMeshShape(fsdp=fsdp, tensor=tensor))
    total, cut, held = 0, 0, 0
    for name, array in full_size("mmdit").items():
        spec = weight_spec(f"mmdit.{name}", array.shape, mesh)
        total += array.size
        cut += array.size * ("fsdp" in spec)
        held += math.prod(NamedSharding(mesh, spec).shard_shape(array.shape))
    assert cut > 0.999 * total
    # Vectors, 0.03% of the weights, are whole; modulations, 27% of them, are not cut by tensor.
    assert held < total / fsdp * (0.28 + 0.73 / tensor)


def test_heads_and_columns_are_cut_by_tensor():
    mesh = make_mesh(TrainingMeshShape(tensor=2))
    cut = {name for name, array in full_size("mmdit").items() if "tensor" in weight_spec(name, array.shape, mesh)}
    parts = ("qkv.lin.kernel", "qkv.lin.bias", "mlp_in.kernel", "mlp_in.bias")
    blocks = ("double_blocks.img", "double_blocks.txt", "single_blocks")
    assert {f"{block}.{part}" for block in blocks for part in parts} <= cut
    assert {"double_blocks.img.proj.kernel", "double_blocks.txt.mlp_out.kernel", "single_blocks.out.kernel"} <= cut


def test_an_adapter_fits():
    mesh = make_mesh(TrainingMeshShape(fsdp=4, tensor=2))
    model_class, config_class = MODELS["mmdit"]
    model = nnx.eval_shape(lambda: model_class(config_class(), rngs=nnx.Rngs(0), dtype=jnp.float32))
    targets = ("qkv.lin", "proj", "mlp_in", "mlp_out", "out")
    arrays = jax.eval_shape(lambda key: lora.init(model, 32, 16.0, targets, key).arrays, jax.random.key(0))
    for name, array in arrays.items():
        assert_fits(f"lora.{name}", array.shape, mesh)
        assert weight_spec(f"lora.{name}", array.shape, mesh)[0] is None
