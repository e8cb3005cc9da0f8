"""bundle.json and index.json: what is written is read, and whatever is missing or damaged is said in one line."""

import hashlib
import json
import re

import pytest

from osjax.bundle import Component, Part, bytes_on_disk, read_bundle, read_index, write_index, write_manifest
from osjax.errors import OsjaxError

T5 = Component(
    kind="t5",
    config={"d_model": 8, "sizes": (1, 2), "nested": {"more": (3,)}},
    dtype="bfloat16",
    parameters=10,
    bytes=20,
    folder="t5",
    tokenizer="t5/tokenizer",
    max_length=16,
)
VAE = Component(kind="hunyuan_vae", config={}, dtype="float32", parameters=1, bytes=4, folder="vae")
SOURCES = {"a.safetensors": {"sha256": "0" * 64, "bytes": 3}}


@pytest.fixture
def bundle(tmp_path):
    for name in ("t5", "vae"):
        (tmp_path / name / "part-00000").mkdir(parents=True)
        (tmp_path / name / "part-00000" / "data").write_bytes(b"12345")
        write_index(tmp_path / name, [Part("part-00000", 5, {"a": (0, 2), "b": None})])
    (tmp_path / "t5" / "tokenizer").mkdir()
    write_manifest(tmp_path, {"t5": T5, "vae": VAE}, SOURCES, {"steps": 4})
    return tmp_path


def test_what_is_written_is_read(bundle):
    found = read_bundle(bundle)
    assert found.components == {"t5": T5, "vae": VAE}
    assert found.sources == SOURCES
    assert found.settings == {"steps": 4}
    assert found.digest == hashlib.sha256((bundle / "bundle.json").read_bytes()).hexdigest()
    assert found.folder("vae") == bundle / "vae"
    assert found.tokenizer("t5") == bundle / "t5" / "tokenizer"
    assert read_index(bundle / "t5") == (Part("part-00000", 5, {"a": (0, 2), "b": None}),)


def test_what_a_bundle_does_not_hold(bundle):
    found = read_bundle(bundle)
    with pytest.raises(OsjaxError, match=r"has no clip \(it holds t5, vae\): convert"):
        found.component("clip")
    with pytest.raises(OsjaxError, match=r"vae in bundle .* has no tokenizer"):
        found.tokenizer("vae")


@pytest.mark.parametrize("lost", ["bundle.json", "t5/index.json", "t5/tokenizer", "vae/index.json"])
def test_incomplete_bundles(bundle, lost):
    path = bundle / lost
    path.rmdir() if path.is_dir() else path.unlink()
    with pytest.raises(OsjaxError, match=r"no bundle at|is incomplete \(" + re.escape(lost)):
        read_bundle(bundle)


def test_no_folder_at_all(tmp_path):
    with pytest.raises(OsjaxError, match=r"no bundle at .*: make one with osjax convert"):
        read_bundle(tmp_path / "absent")


@pytest.mark.parametrize("keep", [0, 1, 100, -20])
def test_a_truncated_manifest(bundle, keep):
    manifest = bundle / "bundle.json"
    manifest.write_bytes(manifest.read_bytes()[:keep])
    with pytest.raises(OsjaxError, match=r"bundle\.json is damaged"):
        read_bundle(bundle)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "has version 2, this osjax reads 1: convert it again"),
        ({"format": "other"}, "is damaged"),
        ({"components": []}, "is damaged"),
        ({"components": {"t5": {"kind": "t5"}}}, "is damaged"),
        ({"components": {"t5": 3}}, "is damaged"),
        ({"sources": 3}, "is damaged"),
    ],
    ids=str,
)
def test_a_manifest_of_other_content(bundle, change, message):
    manifest = json.loads((bundle / "bundle.json").read_text())
    (bundle / "bundle.json").write_text(json.dumps(manifest | change))
    with pytest.raises(OsjaxError, match=message):
        read_bundle(bundle)


@pytest.mark.parametrize("data", [b"1234", b"123456", None], ids=["shorter", "longer", "missing"])
def test_a_part_that_was_not_copied_whole(bundle, data):
    path = bundle / "t5" / "part-00000" / "data"
    path.unlink() if data is None else path.write_bytes(data)
    with pytest.raises(OsjaxError, match=r"is incomplete \(part-00000\)"):
        read_index(bundle / "t5")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"parts": [{"name": 3}]}', '{"parts": 3}'])
def test_a_damaged_index(bundle, text):
    (bundle / "t5" / "index.json").write_text(text)
    with pytest.raises(OsjaxError, match=r"index\.json is damaged"):
        read_index(bundle / "t5")


def test_bytes_on_disk(bundle):
    assert bytes_on_disk(bundle / "t5" / "part-00000") == 5
    assert bytes_on_disk(bundle / "absent") == 0
