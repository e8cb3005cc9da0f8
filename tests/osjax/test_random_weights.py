"""Random weights: of the sizes asked for, where they are asked for."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from osjax import random_weights
from osjax.models.quantized import PRECISIONS
from osjax.models.streamed import cut
from osjax.parallel.host_memory import to_host
from osjax.parallel.mesh import make_mesh, parse_mesh
from osjax.residency import abstract_model
from tests.small_models import SMALL


def test_counts_of_the_published_model():
    components = random_weights.bundle_of(random_weights.PUBLISHED).components
    counts = {name: round(each.parameters / 1e9, 2) for name, each in components.items()}
    assert counts == {"t5": 4.76, "clip": 0.12, "mmdit": 11.89, "vae": 0.25}
    assert all(each.bytes == 2 * each.parameters for each in components.values())


@pytest.mark.parametrize("mesh", ["data=1,seq=1", "data=2,seq=2"])
def test_drawn_alike_on_every_mesh(mesh):
    component = random_weights.bundle_of(SMALL).components["clip"]
    devices = make_mesh(parse_mesh(mesh))
    drawn = jax.tree.leaves(random_weights.draw(component, devices, jnp.float32))
    assert sum(leaf.size for leaf in drawn) == component.parameters
    assert {leaf.dtype for leaf in drawn} == {jnp.dtype(jnp.float32)}
    assert {len(leaf.sharding.device_set) for leaf in drawn} == {devices.size}
    assert all(leaf.sharding.is_fully_replicated for leaf in drawn)
    alone = jax.tree.leaves(random_weights.draw(component, make_mesh(parse_mesh("data=1,seq=1")), jnp.float32))
    for ours, theirs in zip(drawn, alone, strict=True):
        np.testing.assert_array_equal(np.asarray(ours), np.asarray(theirs))
    assert any(np.asarray(leaf).std() > 0 for leaf in drawn)


@pytest.mark.parametrize("precision", ["fp8", "int8"])
def test_an_mmdit_in_8_bits_gives_numbers_of_the_usual_size(precision):
    component = dataclasses.replace(random_weights.bundle_of(SMALL).components["mmdit"], precision=precision)
    model = random_weights.draw(component, make_mesh(parse_mesh("data=1,seq=2")), jnp.float32)
    assert jax.tree.structure(model) == jax.tree.structure(abstract_model(component, jnp.float32))
    linear = jax.tree.map(lambda leaf: leaf[1], model.single_blocks.mlp_in)
    assert linear.kernel[...].dtype == PRECISIONS[precision]
    y = linear(jax.random.normal(jax.random.key(0), (64, linear.kernel.shape[-1])))
    assert 0.8 < float(y.std()) < 1.2


def test_an_mmdit_is_drawn_in_parts_of_the_same_shapes():
    component = random_weights.bundle_of(SMALL).components["mmdit"]
    mesh = make_mesh(parse_mesh("data=1,seq=2"))
    parts = random_weights.draw_layers(component, mesh, jnp.bfloat16, to_host)
    whole = jax.eval_shape(cut, abstract_model(component, jnp.bfloat16))
    assert jax.tree.structure(parts) == jax.tree.structure(whole)
    for found, wanted in zip(jax.tree.leaves(parts), jax.tree.leaves(whole), strict=True):
        assert (found.shape, found.dtype) == (wanted.shape, wanted.dtype)
        assert found.sharding.memory_kind == "pinned_host"
    first, second, *_ = (np.asarray(block.out.kernel[...], np.float32) for block in parts.single)
    assert (first != second).any()


@pytest.mark.parametrize("offload", [True, False])
def test_models_need_no_files(offload):
    mesh = make_mesh(parse_mesh("data=1,seq=1"))
    bundle = random_weights.bundle_of(SMALL)
    residency = random_weights.residency(bundle, mesh, jnp.bfloat16, offload=offload)
    assert residency.loaded == (), "each is drawn when it is needed: together they may be too much"
    for name, component in bundle.components.items():
        with residency.on_device(name) as module:
            leaves = jax.tree.leaves(module)
            assert sum(leaf.size for leaf in leaves) == component.parameters
            assert {leaf.sharding.memory_kind for leaf in leaves} == {"device"}
        assert all(leaf.is_deleted() == offload for leaf in leaves)
