"""LoRAs on disk: as they were saved, whole or not there, refused where they are damaged or of another model."""

import dataclasses
import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from osjax import adapters
from osjax.errors import OsjaxError
from osjax.models import lora
from osjax.models.lora import LoRA
from osjax.models.mmdit import MMDiT, MMDiTConfig

CONFIG = MMDiTConfig(
    in_channels=8,
    vec_in_dim=8,
    context_in_dim=8,
    hidden_size=32,
    num_heads=2,
    depth=1,
    depth_single_blocks=2,
    axes_dim=(4, 6, 6),
)


def abstract(config: MMDiTConfig = CONFIG) -> MMDiT:
    return nnx.eval_shape(lambda: MMDiT(config, rngs=nnx.Rngs(0)))


def adapter(seed: int = 0) -> LoRA:
    made = jax.eval_shape(lambda key: lora.init(abstract(), 2, 3.0, ["qkv.lin", "out"], key), jax.random.key(0))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda each: rng.normal(size=each.shape).astype(np.float32), made)


@pytest.fixture
def folder(tmp_path):
    adapters.save(tmp_path / "style", adapter(), CONFIG, {"steps": 3})
    return tmp_path / "style"


def change(folder, **changes):
    path = folder / "lora.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_it_comes_back_as_it_was(folder):
    described = adapters.read(folder)
    assert (described.name, described.metadata, described.lora.scale) == ("style", {"steps": 3}, 1.5)
    assert described.base == json.loads(json.dumps(dataclasses.asdict(CONFIG)))
    loaded = adapters.load(described)
    assert loaded.scale == 1.5
    assert loaded.arrays.keys() == adapter().arrays.keys()
    for name, array in adapter().arrays.items():
        np.testing.assert_array_equal(loaded.arrays[name], array)


def test_it_is_loaded_where_it_is_wanted(folder):
    sharding = NamedSharding(jax.make_mesh((8,), ("data",)), P())
    loaded = adapters.load(adapters.read(folder), sharding)
    assert all(each.sharding == sharding for each in jax.tree.leaves(loaded))


def test_the_digest_is_that_of_the_content(folder, tmp_path):
    digest = adapters.read(folder).sha256
    adapters.save(tmp_path / "again", jax.tree.map(jnp.asarray, adapter()), CONFIG)
    assert adapters.read(tmp_path / "again").sha256 == digest
    adapters.save(tmp_path / "other", adapter(seed=1), CONFIG, {"steps": 3})
    adapters.save(tmp_path / "stronger", dataclasses.replace(adapter(), scale=2.0), CONFIG, {"steps": 3})
    assert len({digest, *(adapters.read(tmp_path / name).sha256 for name in ("other", "stronger"))}) == 3


def test_nothing_is_overwritten(folder):
    before = (folder / "lora.json").read_text()
    with pytest.raises(OsjaxError, match="exists"):
        adapters.save(folder, adapter(seed=1), CONFIG)
    assert (folder / "lora.json").read_text() == before
    assert os.listdir(folder.parent) == ["style"]


def test_no_half_of_one_appears(tmp_path):
    broken = dataclasses.replace(adapter(), scale=object())  # what JSON refuses, after the arrays
    with pytest.raises(TypeError):
        adapters.save(tmp_path / "style", broken, CONFIG)
    assert not list(tmp_path.iterdir())


def test_it_fits_the_model_it_was_made_for(folder):
    adapters.check(adapters.read(folder), abstract())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"depth_single_blocks": 3}, r"another model \(depth_single_blocks 2, not 3\)"),
        ({"hidden_size": 64, "axes_dim": (8, 12, 12)}, r"hidden_size 32, not 64; axes_dim \[4, 6, 6\], not"),
    ],
)
def test_another_model_is_refused(folder, changes, message):
    with pytest.raises(OsjaxError, match=message):
        adapters.check(adapters.read(folder), abstract(dataclasses.replace(CONFIG, **changes)))


def test_what_it_does_not_touch_may_differ(folder):
    adapters.check(adapters.read(folder), abstract(dataclasses.replace(CONFIG, cond_embed=False, vec_in_dim=16)))


def test_a_projection_that_no_model_has_is_refused(folder):
    manifest = json.loads((folder / "lora.json").read_text())
    change(folder, projections={"double_blocks.nothing": manifest["projections"]["single_blocks.out"]})
    with pytest.raises(OsjaxError, match=r"unknown: double_blocks\.nothing"):
        adapters.check(adapters.read(folder), abstract())


def test_damaged_arrays_are_refused(folder):
    change(folder, sha256="0" * 64)
    with pytest.raises(OsjaxError, match="its content has changed"):
        adapters.load(adapters.read(folder))


def test_a_truncated_copy_is_refused(folder):
    largest = max((path for path in (folder / "arrays").rglob("*") if path.is_file()), key=os.path.getsize)
    largest.write_bytes(largest.read_bytes()[:-10])
    with pytest.raises(OsjaxError, match="incomplete"):
        adapters.load(adapters.read(folder))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": "osjax-bundle"}, "is damaged"),
        ({"version": 2}, "has version 2, this osjax reads 1"),
        ({"scale": None}, "is damaged"),
        ({"projections": {"a": {}}}, "is damaged"),
        ({"projections": 3}, "is damaged"),
    ],
)
def test_manifests_that_cannot_be_used(folder, changes, message):
    change(folder, **changes)
    with pytest.raises(OsjaxError, match=message):
        adapters.read(folder)


def test_what_is_no_lora(tmp_path):
    (tmp_path / "peft").mkdir()
    (tmp_path / "peft" / "adapter_config.json").write_text("{}")
    (tmp_path / "style.safetensors").write_text("")
    (tmp_path / "empty").mkdir()
    for name, message in (
        ("missing", "no LoRA at .*missing: check the path"),
        ("peft", "osjax convert .*peft FOLDER"),
        ("style.safetensors", "osjax convert .*style.safetensors FOLDER"),
        ("empty", r"no readable lora\.json"),
    ):
        with pytest.raises(OsjaxError, match=message):
            adapters.read(tmp_path / name)
