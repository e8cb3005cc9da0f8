"""Models come to the devices, wait in host memory, and come back as they were."""

import dataclasses
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from osjax import adapters, leaves
from osjax import residency as residency_module
from osjax.bundle import read_bundle
from osjax.checkpoint import PartWriter
from osjax.errors import OsjaxError
from osjax.models import lora
from osjax.models.quantized import PRECISIONS, quantize
from osjax.models.streamed import cut, is_stacked
from osjax.parallel import host_memory
from osjax.parallel.mesh import make_mesh, parse_mesh
from osjax.pipeline import EMBEDDED
from osjax.residency import Residency


def residency(offload=True, mesh="data=1,seq=1"):
    return Residency(read_bundle(EMBEDDED), make_mesh(parse_mesh(mesh)), jnp.bfloat16, offload=offload)


def arrays(module):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(module)]


def yes():
    return True


@pytest.fixture(scope="module")
def clip():
    """The weights of CLIP, as they lie on disk."""
    with residency(offload=False).on_device("clip") as module:
        return arrays(module)


@pytest.mark.parametrize("mesh", ["data=1,seq=1", "data=2,seq=4"])
def test_a_model_that_left_comes_back_to_the_bit_on_every_device(clip, mesh):
    models = residency(mesh=mesh)
    for _ in range(3):
        with models.on_device("clip") as module:
            leaves = jax.tree.leaves(module)
            for leaf, wanted in zip(leaves, clip, strict=True):
                assert leaf.sharding.memory_kind == "device"
                assert len(leaf.addressable_shards) == len(make_mesh(parse_mesh(mesh)).devices.flat)
                for shard in leaf.addressable_shards:
                    np.testing.assert_array_equal(np.asarray(shard.data), wanted)
        assert all(leaf.is_deleted() for leaf in leaves)


def test_without_offloading_it_stays():
    models = residency(offload=False)
    models.expect("clip", yes)
    assert models.loaded == ()
    with models.on_device("clip") as first:
        pass
    with models.on_device("clip") as second:
        assert [a is b for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(second), strict=True)]
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(first))
    assert models.loaded == ("clip",)


@pytest.mark.parametrize("in_blocks", [False, True])
def test_after_its_last_use_a_model_is_not_kept_but_read_again(in_blocks):
    models, seen = residency(), []
    models.last_use("mmdit")
    for _ in range(3):
        with models.on_device("mmdit", in_blocks=in_blocks) as module:
            there = jax.tree.leaves(module.resident if in_blocks else module)
            seen.append(arrays(module.layers if in_blocks else module))
        assert all(leaf.is_deleted() for leaf in there)
        assert ("mmdit" in models._waiting) == (len(seen) > 1)
    for again in seen[1:]:
        for leaf, first in zip(again, seen[0], strict=True):
            np.testing.assert_array_equal(leaf, first)


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("precision", ["fp8", "int8"])
def test_blocks_are_there_in_8_bits_on_every_device_and_come_back_to_the_bit(offload, precision):
    """The transformer's alone, and the text encoder as it was read."""
    mesh = make_mesh(parse_mesh("data=2,seq=4"))
    parts = Residency(read_bundle(EMBEDDED), mesh, jnp.float32, offload=offload, precision=precision)
    seen = []
    for _ in range(2):
        with parts.on_device("mmdit") as model:
            kernel = model.single_blocks.out.kernel[...]
            assert kernel.dtype == PRECISIONS[precision]
            assert len(kernel.sharding.device_set) == 8
            assert kernel.sharding.is_fully_replicated
            seen.append(arrays(model))
    for first, again in zip(*seen, strict=True):
        np.testing.assert_array_equal(first.view(np.uint8), again.view(np.uint8))
    with parts.on_device("clip") as model:
        assert {leaf.dtype for leaf in jax.tree.leaves(model)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize("precision", ["fp8", "int8"])
@pytest.mark.parametrize("style", [None, "style"])
def test_what_is_changed_as_it_is_read_is_what_changing_the_whole_gives(tmp_path, precision, style):
    bundle, devices = read_bundle(EMBEDDED), make_mesh(parse_mesh("data=1,seq=2"))
    models = Residency(bundle, devices, jnp.bfloat16, offload=False, precision=precision)
    with residency(offload=False).on_device("mmdit") as full:
        if style:
            models.adapt([(save_lora(tmp_path / style, full), 0.5)])
            full = jax.jit(lora.merge)(full, lora.stack([(adapters.load(models.adapters[0][0]), 0.5)]))
        wanted = jax.jit(quantize, static_argnums=1)(full, precision)
    with models.on_device("mmdit") as found:
        same_to_the_bit(found, wanted)


def save_lora(folder, model):
    """A LoRA of every kind of projection, in a stack, in none, with one axis of outputs and with three."""
    targets = ("img.proj", "qkv.lin", "single_blocks.out", "img_in", "final_layer.linear")
    made = lora.init(model, 3, 6.0, targets, jax.random.key(1))
    factors = {name: lora.Factors(a, a.mean() + 0.1 + b) for name, (a, b) in made.factors.items()}
    adapters.save(folder, dataclasses.replace(made, factors=factors), model.config)
    return adapters.read(folder)


@pytest.mark.parametrize("mesh", ["data=1,seq=1", "data=2,seq=4"])
@pytest.mark.parametrize("precision", ["full", "fp8", "int8"])
def test_a_transformer_in_blocks_has_the_weights_of_the_whole_one(mesh, precision):
    bundle, devices = read_bundle(EMBEDDED), make_mesh(parse_mesh(mesh))
    models = Residency(bundle, devices, jnp.bfloat16, offload=True, precision=precision)
    with models.on_device("mmdit") as whole:
        wanted = host_memory.to_host(cut(whole))
    for _ in range(2):  # from disk, and from host memory
        with models.on_device("mmdit", in_blocks=True) as parts:
            same_to_the_bit(parts.layers, wanted)
            block = parts.block(1, then=2)
            same_to_the_bit(block, wanted.double[1])
            there = jax.tree.leaves((parts.rest, block))
            assert {leaf.sharding.memory_kind for leaf in there} == {"device"}
            assert {len(leaf.sharding.device_set) for leaf in there} == {devices.size}
        assert all(leaf.is_deleted() for leaf in jax.tree.leaves(parts.rest))
    with models.on_device("mmdit") as whole:  # and back as a whole
        same_to_the_bit(cut(whole), wanted)


@pytest.mark.parametrize("mesh", ["data=1,seq=1", "data=2,seq=4"])
@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("precision", ["full", "fp8"])
def test_a_transformer_in_parts_has_all_blocks_on_the_devices(mesh, offload, precision):
    """As GPUs have it."""
    bundle, devices = read_bundle(EMBEDDED), make_mesh(parse_mesh(mesh))
    how = {"offload": offload, "precision": precision}
    with Residency(bundle, devices, jnp.bfloat16, **how).on_device("mmdit") as whole:
        wanted = host_memory.to_host(cut(whole))
    models = Residency(bundle, devices, jnp.bfloat16, in_parts=True, **how)
    for in_blocks in [False, False, offload, False]:
        with models.on_device("mmdit", in_blocks=in_blocks) as parts:
            same_to_the_bit(parts.layers, wanted)
            for number, block in enumerate((*wanted.double, *wanted.single)):
                there = parts.block(number, then=(number + 1) % parts.depth)
                same_to_the_bit(there, block)
                assert {leaf.sharding.memory_kind for leaf in jax.tree.leaves(there)} == {"device"}
                assert {len(leaf.sharding.device_set) for leaf in jax.tree.leaves(there)} == {devices.size}
        left = [leaf.is_deleted() for leaf in jax.tree.leaves(parts.rest if in_blocks else parts.layers)]
        assert set(left) == {offload}


def test_only_a_transformer_is_in_parts():
    models = Residency(
        read_bundle(EMBEDDED), make_mesh(parse_mesh("seq=1")), jnp.bfloat16, offload=False, in_parts=True
    )
    with models.on_device("t5") as encoder:
        assert arrays(encoder)


def test_one_that_is_given_stays_as_it_is():
    with residency(offload=False).on_device("mmdit") as whole:
        how = {"modules": {"mmdit": whole}, "in_parts": True}
        given = Residency(read_bundle(EMBEDDED), make_mesh(parse_mesh("seq=1")), jnp.bfloat16, offload=False, **how)
        with given.on_device("mmdit") as found:
            same_to_the_bit(found, whole)


@pytest.mark.parametrize("precision", ["full", "int8"])
def test_a_transformer_in_blocks_has_the_loras_of_the_whole_one(tmp_path, precision):
    bundle, devices = read_bundle(EMBEDDED), make_mesh(parse_mesh("seq=2"))
    style = save_lora(tmp_path / "style", residency()._stored("mmdit"))
    models = Residency(bundle, devices, jnp.bfloat16, offload=True, precision=precision)
    models.adapt([(style, 0.5)])
    with models.on_device("mmdit") as whole:
        wanted = host_memory.to_host(cut(whole))
    with models.on_device("mmdit", in_blocks=True) as parts:
        same_to_the_bit(parts.layers, wanted)
    there = Residency(bundle, devices, jnp.bfloat16, offload=False, precision=precision, in_parts=True)
    there.adapt([(style, 0.5)])
    with there.on_device("mmdit") as parts:
        same_to_the_bit(parts.layers, wanted)
    models.adapt([])
    with models.on_device("mmdit", in_blocks=True) as parts, pytest.raises(AssertionError):
        same_to_the_bit(parts.layers, wanted)


def test_layers_are_read_as_a_converter_writes_them_and_as_training_does(tmp_path):
    """Layer by layer in many parts, or whole stacks."""
    bundle = read_bundle(EMBEDDED)
    with residency(offload=False).on_device("mmdit") as module:
        wanted = cut(module)
        component = tmp_path / bundle.component("mmdit").folder
        component.mkdir(parents=True)
        writer = PartWriter(component, part_bytes=30_000)
        for leaf, array in leaves.flatten(module).items():
            stacked = is_stacked(leaf)
            for layer, row in enumerate(array) if stacked else [(None, array)]:
                writer.add(leaf, layer, row)
        writer.close()
    other = Residency(
        dataclasses.replace(bundle, path=tmp_path), make_mesh(parse_mesh("seq=1")), jnp.bfloat16, offload=True
    )
    with other.on_device("mmdit", in_blocks=True) as parts:
        same_to_the_bit(parts.layers, wanted)


def same_to_the_bit(found, wanted):
    assert jax.tree.structure(found) == jax.tree.structure(wanted)
    for one, other in zip(arrays(found), arrays(wanted), strict=True):
        assert one.dtype == other.dtype
        np.testing.assert_array_equal(one.view(np.uint8), other.view(np.uint8))


@pytest.mark.parametrize("left_before", [False, True])
def test_what_is_expected_comes_while_another_works(clip, left_before):
    models = residency()
    if left_before:
        with models.on_device("clip"):
            pass
    with models.on_device("t5"):
        models.expect("clip", yes)
        models.expect("clip", yes)  # once is enough
        models.expect("t5", yes)  # which is there
        coming = models._coming["clip"]
        coming.result()
    with models.on_device("clip") as module:
        assert module is coming.result()
        for leaf, wanted in zip(arrays(module), clip, strict=True):
            np.testing.assert_array_equal(leaf, wanted)


def test_where_there_is_no_room_it_comes_when_it_is_needed(clip):
    models, asked = residency(), []
    with models.on_device("t5"):
        models.expect("clip", lambda: asked.append(threading.current_thread()))
        assert models._coming["clip"].result() is None
    assert asked[0] is not threading.current_thread()
    with models.on_device("clip") as module:
        for leaf, wanted in zip(arrays(module), clip, strict=True):
            np.testing.assert_array_equal(leaf, wanted)


def test_what_goes_wrong_is_told_where_the_model_is_needed():
    models = residency()

    def broken():
        raise OsjaxError("no such weights")

    models.expect("clip", broken)
    with pytest.raises(OsjaxError, match="no such weights"), models.on_device("clip"):
        pass
    with models.on_device("clip") as module:
        assert arrays(module)


def test_a_copy_waits_in_page_locked_memory_once():
    mesh = make_mesh(parse_mesh("data=2,seq=4"))
    everywhere = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    there = host_memory.to_host({"a": jax.device_put(jnp.arange(6.0), everywhere)})["a"]
    assert there.sharding.memory_kind == "pinned_host"
    assert len(there.addressable_shards) == 1


def test_where_no_more_can_be_locked_ordinary_memory_does(monkeypatch):
    def full(array):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Failed to allocate host memory")

    monkeypatch.setattr(host_memory, "_page_locked", full)  # a host's limit cannot be reached on a CPU
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    given = jax.device_put(jnp.arange(6.0), sharding)
    there = host_memory.to_host([given])
    assert isinstance(there[0], np.ndarray)
    np.testing.assert_array_equal(host_memory.to_devices(there, sharding)[0], np.arange(6.0))


@pytest.mark.parametrize(("mesh", "there"), [("data=1,seq=1", True), ("data=2,seq=1", False)])
def test_the_autoencoder_gets_the_convolution_of_a_single_device(monkeypatch, mesh, there):
    def other(*_):
        raise AssertionError("never run")

    asked = []
    monkeypatch.setattr(residency_module, "choose_convolution", lambda *what: asked.append(what) or other)
    with residency(mesh=mesh).on_device("vae") as vae:
        assert (vae.decoder.conv_in.convolve is other) == there
    assert asked == ([(jax.devices()[0], jnp.bfloat16)] if there else [])
