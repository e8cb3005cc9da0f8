"""The models of a run: from a bundle or from nothing, and into a bundle again."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from osjax import leaves
from osjax.bundle import read_bundle
from osjax.errors import OsjaxError
from osjax.parallel.mesh import TrainingMeshShape, make_mesh
from osjax.parallel.weights import weight_spec
from osjax.pipeline import EMBEDDED
from osjax.training.parts import export, load_weights, named, only, open_parts
from osjax.training.tokenizers import train_tokenizer
from tests.osjax.training import micro

KEY = jax.random.key(5)
ONE = make_mesh(TrainingMeshShape())


@pytest.fixture(scope="module")
def new(tmp_path_factory):
    """A micro T5 and an autoencoder, to be drawn."""
    folder = tmp_path_factory.mktemp("tokenizer")
    train_tokenizer("t5", 300, folder)
    return {"vae": micro.VAE, "t5": {**micro.T5, "tokenizer": str(folder)}}


@pytest.fixture(scope="module")
def drawn(new):
    """(parts of which t5 is trained, trained weights, frozen weights)."""
    parts = open_parts(None, new, ("t5",), jnp.float32)
    return parts, *load_weights(parts, ONE, KEY)


@pytest.fixture(scope="module")
def bundle(drawn, tmp_path_factory):
    parts, trained, frozen = drawn
    return export(parts, trained | frozen, tmp_path_factory.mktemp("parts") / "bundle", {})


def rounded(weights):
    return {name: np.asarray(array.astype(jnp.bfloat16), np.float32) for name, array in weights.items()}


def assert_equal(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(np.asarray(ours[name], np.float32), theirs[name], err_msg=name)


def test_the_embedded_bundle_opens_trained_in_float32_and_frozen_in_the_dtype_of_the_computation():
    parts = open_parts(str(EMBEDDED), {}, ("t5",), jnp.bfloat16)
    assert set(parts.components) == {"mmdit", "vae", "t5", "clip"}
    assert parts.digest == read_bundle(EMBEDDED).digest
    trained, frozen = load_weights(parts, ONE, KEY)
    assert {name.split(".")[0] for name in trained} == {"t5"}
    assert {name.split(".")[0] for name in frozen} == {"mmdit", "vae", "clip"}
    assert {array.dtype for array in trained.values()} == {jnp.dtype(jnp.float32)}
    assert {array.dtype for array in frozen.values()} == {jnp.dtype(jnp.bfloat16)}
    built = parts.build(trained, frozen)
    assert {array.dtype for array in jax.tree.leaves(built["t5"])} == {jnp.dtype(jnp.bfloat16)}


def test_modules_hold_the_weights(drawn):
    parts, trained, frozen = drawn
    assert set(parts.build(trained)) == {"t5"}
    built = parts.build(trained, frozen)
    for component, module in built.items():
        assert_equal(named(component, leaves.flatten(module)), only(trained | frozen, component))


def test_what_is_exported_opens_again(drawn, bundle):
    """Rounded to bfloat16, bit for bit."""
    parts, trained, frozen = drawn
    opened = open_parts(str(bundle), {}, ("t5", "vae"), jnp.float32)
    again, _ = load_weights(opened, ONE, KEY)
    assert_equal(again, rounded(trained | frozen))
    for name, component in read_bundle(bundle).components.items():
        arrays = only(again, name).values()
        assert component.config == parts.components[name].config
        assert component.dtype == "bfloat16"
        assert component.parameters == sum(array.size for array in arrays)
        assert component.bytes == 2 * component.parameters
    assert (bundle / "t5" / "tokenizer" / "tokenizer.json").is_file()
    assert read_bundle(bundle).component("t5").tokenizer == "t5/tokenizer"


def test_weights_are_the_same_on_every_mesh_and_lie_by_the_table(drawn):
    parts, trained, frozen = drawn
    mesh = make_mesh(TrainingMeshShape(2, 2, 2))
    placed, others = load_weights(parts, mesh, KEY)
    assert_equal(placed | others, {name: np.asarray(array) for name, array in (trained | frozen).items()})
    assert all(array.sharding.spec == weight_spec(name, array.shape, mesh) for name, array in placed.items())
    assert any("fsdp" in array.sharding.spec for array in placed.values())


def test_what_was_not_trained_is_copied_and_what_was_found_is_told(bundle, tmp_path):
    """The autoencoder's files are those of the bundle; a bfloat16 T5 that is trained stays what it is."""
    parts = open_parts(str(bundle), {}, ("t5",), jnp.float32)
    trained, frozen = load_weights(parts, ONE, KEY)
    changed = {name: array + 1 for name, array in trained.items()}
    other = export(parts, changed | frozen, tmp_path / "other", {"t5": {"layer_norm_epsilon": 0.5}}, jnp.float32)
    files = {path.relative_to(bundle / "vae") for path in (bundle / "vae").rglob("*") if path.is_file()}
    assert files
    assert all((other / "vae" / file).read_bytes() == (bundle / "vae" / file).read_bytes() for file in files)
    assert read_bundle(other).component("vae") == read_bundle(bundle).component("vae")
    assert read_bundle(other).component("t5").config["layer_norm_epsilon"] == 0.5
    again, _ = load_weights(open_parts(str(other), {}, ("t5",), jnp.float32), ONE, KEY)
    assert_equal(again, {name: np.asarray(array) for name, array in changed.items()})


def test_other_weights_of_equal_shapes_make_another_digest(drawn, bundle, tmp_path):
    """Which tells videos, and latents that are kept, of one bundle from those of another."""
    parts, trained, frozen = drawn
    changed = {name: array + 1 for name, array in trained.items()}
    other = read_bundle(export(parts, changed | frozen, tmp_path / "other", {}))
    assert other.components == read_bundle(bundle).components
    assert other.digest != read_bundle(bundle).digest
    assert other.sources["vae"] == read_bundle(bundle).sources["vae"]


def test_a_new_component_takes_the_place_of_the_bundles(bundle):
    parts = open_parts(str(bundle), {"vae": {**micro.VAE, "latent_channels": 2}}, (), jnp.float32)
    assert set(parts.folders) == {"t5"}
    _, frozen = load_weights(parts, ONE, KEY)
    assert frozen["vae.decoder.conv_in.kernel"].shape[-2] == 2


def test_a_bundle_is_replaced_even_by_what_is_made_of_it(bundle, tmp_path):
    here = tmp_path / "bundle"
    shutil.copytree(bundle, here)
    (here / "mmdit").mkdir()
    parts = open_parts(str(here), {}, ("t5",), jnp.float32)
    trained, frozen = load_weights(parts, ONE, KEY)
    export(parts, trained | frozen, here, {})
    assert sorted(path.name for path in here.iterdir()) == ["bundle.json", "t5", "vae"]
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    again, _ = load_weights(open_parts(str(here), {}, ("t5", "vae"), jnp.float32), ONE, KEY)
    assert_equal(only(again, "t5"), {name: np.asarray(array) for name, array in trained.items()})


def test_what_cannot_be_written_leaves_the_old_bundle(drawn, bundle, tmp_path):
    parts, trained, frozen = drawn
    here = tmp_path / "bundle"
    shutil.copytree(bundle, here)
    before = (here / "bundle.json").read_bytes()
    gone = {name: dataclasses.replace(each, tokenizer="nowhere") for name, each in parts.components.items()}
    with pytest.raises(OsjaxError, match="cannot write"):
        export(dataclasses.replace(parts, components=gone), trained | frozen, here, {})
    assert (here / "bundle.json").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]
    read_bundle(here)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vae", {"kind": "hunyuan"}, r"new.vae.kind is 'hunyuan': use one of mmdit, flux, hunyuan_vae, t5, clip"),
        ("vae", {"latent_channels": 4}, r"new.vae.kind is None"),
        ("vae", {**micro.VAE, "chanels": 3}, r"hunyuan_vae has unknown options chanels"),
        ("mmdit", {**micro.MMDIT, "num_heads": 3}, r"hidden_size 16 does not divide into 3 heads"),
        ("t5", {"kind": "t5", "tokenizer": "folder"}, r"new.t5 has a tokenizer but no max_length: give the tokens"),
    ],
)
def test_new_components_that_are_described_wrongly(name, options, message):
    with pytest.raises(OsjaxError, match=message):
        open_parts(None, {name: options}, (), jnp.float32)


def test_what_is_to_be_trained_must_be_there():
    with pytest.raises(OsjaxError, match=r"no clip, mmdit to train \(there is vae\): give ckpt_path or new"):
        open_parts(None, {"vae": micro.VAE}, ("mmdit", "vae", "clip"), jnp.float32)
    with pytest.raises(OsjaxError, match=r"there is nothing"):
        open_parts(None, {}, ("mmdit",), jnp.float32)


def test_a_bundle_that_is_none(tmp_path):
    (tmp_path / "bundle.json").write_text(json.dumps({"format": "other"}))
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(OsjaxError, match="bundle"):
            open_parts(str(path), {}, (), jnp.float32)
