"""`--quantize`: bundles whose transformers are in 8 bits are to the bit what `--precision` makes of the full ones."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from convert.__main__ import PRECISIONS, main
from osjax import leaves, provenance
from osjax.bundle import MANIFEST, read_bundle
from osjax.cli.main import main as osjax
from osjax.errors import OsjaxError
from osjax.models import quantized
from osjax.parallel.mesh import make_mesh, parse_mesh
from osjax.pipeline import Pipeline
from osjax.residency import Residency, chosen_precision
from osjax.training.parts import open_parts
from tests import upstream_folder
from tests.parity import cases

PARTS = ("mmdit_video", "hunyuan_vae", "text_t5", "text_clip", "mmdit_flux", "autoencoder_2d")  # go together
CPU = jax.devices()[0]


@pytest.fixture(scope="module")
def ckpts(tmp_path_factory):
    return upstream_folder.write(
        tmp_path_factory.mktemp("ckpts"), *(cases.load(name, cases.VENDORED) for name in PARTS)
    )


@pytest.fixture(scope="module")
def full(ckpts, tmp_path_factory):
    return converted(ckpts, tmp_path_factory.mktemp("bundles") / "full")


@pytest.fixture(scope="module", params=PRECISIONS)
def small(request, ckpts, tmp_path_factory):
    """(precision, its bundle)."""
    folder = tmp_path_factory.mktemp("bundles") / request.param
    return request.param, converted(ckpts, folder, "--quantize", request.param)


def converted(ckpts, folder, *words):
    assert main([str(ckpts), str(folder), "--dtype", "bf16", *words]) == 0
    return read_bundle(folder)


def weights(bundle, name, precision, dtype=jnp.bfloat16):
    residency = Residency(bundle, make_mesh(parse_mesh("data=1,seq=1")), dtype, offload=False, precision=precision)
    with residency.on_device(name) as module:
        return leaves.flatten(module)


def test_the_names_are_the_models():
    assert tuple(quantized.PRECISIONS) == PRECISIONS


@pytest.mark.parametrize("name", ["mmdit", "image_mmdit"])
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_what_is_stored_is_what_the_full_one_becomes(full, small, name, dtype):
    precision, bundle = small
    held, expected = (weights(each, name, precision, dtype) for each in (bundle, full))
    assert held.keys() == expected.keys()
    assert any(array.dtype == quantized.PRECISIONS[precision] for array in held.values())
    for leaf, array in expected.items():
        assert held[leaf].dtype == array.dtype
        np.testing.assert_array_equal(np.asarray(held[leaf]), np.asarray(array), err_msg=leaf)


def test_the_manifest_tells_what_is_in_8_bits_and_how_large_it_is(full, small):
    precision, bundle = small
    for name, component in bundle.components.items():
        whole = full.components[name]
        if name in ("mmdit", "image_mmdit"):
            arrays = weights(bundle, name, precision).values()
            assert component == dataclasses.replace(whole, precision=precision, bytes=component.bytes)
            assert component.bytes == sum(array.nbytes for array in arrays) < whole.bytes
        else:
            assert component == whole


def test_it_draws_without_being_told(full, small, tmp_path):
    """The same video as from the full bundle in that precision; provenance tells."""
    precision, bundle = small
    size = [
        "--height",
        "32",
        "--width",
        "32",
        "--num_frames",
        "5",
        "--num_steps",
        "2",
        "--prompt",
        "a",
        "--dtype",
        "fp32",
    ]
    words = (["--ckpt_path", str(bundle.path)], ["--ckpt_path", str(full.path), "--precision", precision])
    told = []
    for place, more in zip(("stored", "made"), words, strict=True):
        assert osjax(["generate", *more, *size, "--save-dir", str(tmp_path / place)]) == 0
        (video,) = (tmp_path / place).rglob("*.mp4")
        told.append(provenance.read(video.with_suffix(".json")))
    assert told[0].frames_sha256 == told[1].frames_sha256
    assert [(each.precision, each.approximate) for each in told] == [(precision, True)] * 2


def test_the_precision_is_that_of_the_weights(full, small):
    precision, bundle = small
    assert chosen_precision(full, None, CPU) == "full"
    assert chosen_precision(full, precision, CPU) == precision
    assert chosen_precision(bundle, None, CPU) == precision == chosen_precision(bundle, precision, CPU)
    for other in {"full", *PRECISIONS} - {precision}:
        with pytest.raises(OsjaxError, match=f"holds weights in {precision}, not {other}"):
            chosen_precision(bundle, other, CPU)


def test_an_estimate_counts_what_is_there(full, small):
    precision, bundle = small
    stored, made = (
        Pipeline.load(each.path, precision=precision, progress=False).estimate([request_of(each)])
        for each in (bundle, full)
    )
    assert stored.stages == made.stages


def request_of(bundle):
    sizes = {"height": 32, "width": 32, "num_frames": 5, "num_steps": 2}
    return Pipeline.load(bundle.path, progress=False).request(prompt="a", **sizes)


def test_neither_loras_nor_training(small, tmp_path):
    precision, bundle = small
    residency = Residency(
        bundle, make_mesh(parse_mesh("data=1,seq=1")), jnp.bfloat16, offload=False, precision=precision
    )
    residency.adapt(())
    with pytest.raises(OsjaxError, match="into which no LoRA can be merged"):
        residency.adapt([(object(), 1.0)])
    with pytest.raises(OsjaxError, match=r"image_mmdit, mmdit of .* is in 8 bits: train with"):
        open_parts(str(bundle.path), {}, ("mmdit",), jnp.float32)


def test_a_precision_of_another_version(small, tmp_path):
    _, bundle = small
    manifest = json.loads((bundle.path / MANIFEST).read_text())
    manifest["components"]["mmdit"]["precision"] = "fp4"
    other = tmp_path / "other"
    other.mkdir()
    for each in bundle.path.iterdir():
        (other / each.name).symlink_to(each)
    (other / MANIFEST).unlink()
    (other / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(OsjaxError, match="fp4"):
        Pipeline.load(other, progress=False)


def test_a_dry_run_tells_it(ckpts, capsys, tmp_path):
    assert main([str(ckpts), str(tmp_path / "b"), "--quantize", "int8", "--dry-run"]) == 0
    lines = {line.split(":")[0]: line for line in capsys.readouterr().out.splitlines() if " tensors " in line}
    assert {name for name, line in lines.items() if " and int8," in line} == {"mmdit", "image_mmdit"}
    assert not (tmp_path / "b").exists()


def test_where_there_is_no_transformer(ckpts, tmp_path, capsys):
    assert main([str(ckpts), str(tmp_path / "b"), "--as", "hunyuan_vae", "--quantize", "fp8"]) == 2
    assert "--quantize is for transformers" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()
