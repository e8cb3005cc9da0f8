"""Components on disk: whatever parts they are in, they load the same, onto a mesh of any size."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from osjax import checkpoint, leaves
from osjax.bundle import read_index
from osjax.checkpoint import PartWriter, load_component, save_module
from osjax.errors import OsjaxError

LAYERS, WIDTH = 4, 16

# When one array of a part cannot be read, Orbax abandons the coroutines of the others, which Python then mentions.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


class Toy(nnx.Module):
    """Whole leaves, stacked ones, a scalar, and an integer that no dtype touches."""

    def __init__(self, layers: int = LAYERS, width: int = WIDTH, rngs: nnx.Rngs | None = None):
        rngs = rngs or nnx.Rngs(0)
        self.head = nnx.Linear(3, 8, rngs=rngs)
        self.step = nnx.Variable(jnp.asarray(5, jnp.int32))
        self.blocks = nnx.vmap(lambda key: nnx.Linear(width, width, rngs=nnx.Rngs(key)))(
            jax.random.split(rngs(), layers)
        )


ABSTRACT = nnx.eval_shape(Toy)


@pytest.fixture(scope="module")
def toy():
    return Toy()


@pytest.fixture(scope="module", params=["layers", "some layers", "whole"])
def component(request, toy, tmp_path_factory):
    """The toy saved as a converter does, in parts of one layer, of several or of everything, and by save_module."""
    folder = tmp_path_factory.mktemp("component")
    if request.param == "whole":
        save_module(folder, toy)
        return folder
    writer = PartWriter(folder, part_bytes=100 if request.param == "layers" else 3000)
    for name, array in leaves.flatten(toy).items():
        stacked = name.startswith("blocks")
        for layer in range(LAYERS) if stacked else [None]:
            writer.add(name, layer, np.asarray(array[layer] if stacked else array))
    writer.close()
    return folder


def assert_same(module, reference, dtype=None):
    held, expected = leaves.flatten(module), leaves.flatten(reference)
    assert held.keys() == expected.keys()
    for name, array in expected.items():
        wanted = array.astype(dtype) if dtype and name != "step" else array
        assert held[name].dtype == wanted.dtype
        np.testing.assert_array_equal(np.asarray(held[name]), np.asarray(wanted), err_msg=name)


def test_parts_are_as_large_as_asked(toy, tmp_path):
    save_module(tmp_path, toy, part_bytes=1)
    assert [len(part.leaves) for part in read_index(tmp_path)] == [1] * len(leaves.flatten(toy))
    assert_same(load_component(tmp_path, ABSTRACT), toy)


def test_reading_that_takes_long_shows_a_bar(component, monkeypatch, capfd):
    for after, progress, seen in [(0.0, True, True), (0.0, False, False), (60.0, True, False)]:
        monkeypatch.setattr(checkpoint, "BAR_AFTER", after)
        load_component(component, ABSTRACT, progress=progress)
        told = capfd.readouterr().err
        assert (f"load {component.name}: 100%" in told) == seen
        assert bool(told) == seen


def test_onto_the_first_device(component, toy):
    loaded = load_component(component, ABSTRACT)
    assert isinstance(loaded, Toy)
    assert_same(loaded, toy)
    assert leaves.flatten(loaded)["blocks.kernel"].sharding == SingleDeviceSharding(jax.devices()[0])


SPECS = [P(), P(None, None, "x"), P(None, "x"), P("x")]


@pytest.mark.parametrize("axis_type", [AxisType.Explicit, AxisType.Auto])
@pytest.mark.parametrize(("devices", "spec"), [(1, P("x")), (8, SPECS[0]), (8, SPECS[1]), (8, SPECS[2]), (4, SPECS[3])])
def test_onto_a_mesh(component, toy, devices, spec, axis_type):
    mesh = jax.make_mesh((devices,), ("x",), (axis_type,), devices=jax.devices()[:devices])

    def place(leaf):
        return NamedSharding(mesh, spec if leaf == "blocks.kernel" else P())

    loaded = load_component(component, ABSTRACT, shardings=place)
    assert_same(loaded, toy)
    for name, array in leaves.flatten(loaded).items():
        assert array.sharding == place(name)
        assert {shard.data.shape for shard in array.addressable_shards} == {place(name).shard_shape(array.shape)}


def test_floating_leaves_are_cast(component, toy):
    assert_same(load_component(component, ABSTRACT, jnp.bfloat16), toy, jnp.bfloat16)


@pytest.mark.parametrize("other", [{"layers": LAYERS + 1}, {"layers": LAYERS - 1}, {"width": 8}], ids=str)
def test_another_shape_is_an_error(component, other):
    with pytest.raises(OsjaxError, match=r"does not fit its model|not of this model \(Requested shape"):
        load_component(component, nnx.eval_shape(lambda: Toy(**other)))


def test_leaves_of_another_model_are_named(component):
    with pytest.raises(OsjaxError, match=r"unknown: blocks\.bias, .*; missing, incomplete or twice: bias"):
        load_component(component, nnx.eval_shape(lambda: nnx.Linear(3, 8, rngs=nnx.Rngs(0))))


def save_layers(folder, toy, layers, part_bytes=1):
    writer = PartWriter(folder, part_bytes)
    for name, array in leaves.flatten(toy).items():
        for layer in layers if name == "blocks.bias" else [None]:
            writer.add(name, layer, np.asarray(array if layer is None else array[layer]))
    writer.close()


@pytest.mark.parametrize("layers", [[0, 1, 2], [0, 2, 3], [1, 2, 3], [0, 1, 1, 2, 3], [0, 1, 2, 3, 3]], ids=str)
def test_layers_missing_or_twice(toy, tmp_path, layers):
    save_layers(tmp_path, toy, layers)
    with pytest.raises(OsjaxError, match=r"missing, incomplete or twice: blocks\.bias\)"):
        load_component(tmp_path, ABSTRACT)


@pytest.mark.parametrize("part_bytes", [1, 10_000])
def test_layers_in_any_order(toy, tmp_path, part_bytes):
    save_layers(tmp_path, toy, [2, 3, 0, 1], part_bytes)
    assert_same(load_component(tmp_path, ABSTRACT), toy)


@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped"])
def test_every_damaged_file_is_an_error(component, tmp_path, damage):
    """Of the files that hold data or say where it is; a flipped bit in plain numbers cannot be seen."""
    copy = tmp_path / "copy"
    shutil.copytree(component, copy)
    for path in [path for path in copy.rglob("*") if path.is_file() and path.stat().st_size]:
        whole = path.read_bytes()
        if damage == "missing":
            path.unlink()
        elif damage == "truncated":
            path.write_bytes(whole[: len(whole) // 2])
        elif path.name not in ("_METADATA", "index.json"):
            continue
        else:
            path.write_bytes(bytes(byte ^ 0x55 for byte in whole))
        with pytest.raises(OsjaxError, match=r"damaged|incomplete|no component"):
            load_component(copy, ABSTRACT)
        path.write_bytes(whole)
