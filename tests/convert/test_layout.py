"""What lies where: upstream's folder, Hugging Face's folders, single files; configs and tokenizers beside them."""

import json

import pytest

from convert.layout import KINDS, find_checkpoints, find_config, max_length, read_options, tokenizer_files
from osjax.errors import OsjaxError

T5 = next(kind for kind in KINDS if kind.name == "t5")
VAE = next(kind for kind in KINDS if kind.name == "hunyuan_vae")


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


def found(source, kind=None, **model):
    return {(each.kind, each.file.relative_to(source).as_posix()) for each in find_checkpoints(source, kind, **model)}


def test_upstreams_folder(tmp_path):
    touch(tmp_path, "Open_Sora_v2.safetensors", "hunyuan_vae.pth", "flux1-dev.safetensors", "README.md")
    touch(tmp_path, "Open_Sora_v2_Video_DC_AE.safetensors", "F32T4C128_AE.safetensors", "flux1-dev-ae.safetensors")
    touch(tmp_path, "google/t5-v1_1-xxl/pytorch_model.bin", "google/t5-v1_1-xxl/tf_model.h5")
    touch(
        tmp_path, "openai/clip-vit-large-patch14/model.safetensors", "openai/clip-vit-large-patch14/pytorch_model.bin"
    )
    clip = ("clip", "openai/clip-vit-large-patch14/model.safetensors")
    texts = {("t5", "google/t5-v1_1-xxl/pytorch_model.bin"), clip}
    flux = {("flux", "flux1-dev.safetensors"), ("autoencoder_2d", "flux1-dev-ae.safetensors")}
    compressed = {("mmdit", "Open_Sora_v2_Video_DC_AE.safetensors"), ("dc_ae", "F32T4C128_AE.safetensors")}
    usual = {("mmdit", "Open_Sora_v2.safetensors"), ("hunyuan_vae", "hunyuan_vae.pth")}
    assert found(tmp_path) == usual | texts | flux
    assert found(tmp_path, model="high_compression") == compressed | texts
    assert found(tmp_path, "clip") == {clip}
    assert found(tmp_path, "mmdit", model="high_compression") | found(tmp_path, "dc_ae") == compressed


@pytest.mark.parametrize("name", ["Open_Sora_v2.safetensors.index.json", "Open_Sora_v2/model.safetensors.index.json"])
def test_sharded_at_its_place(tmp_path, name):
    folder = (tmp_path / name).parent
    touch(folder, "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    touch(tmp_path, name)
    assert found(tmp_path) == {("mmdit", name)}


@pytest.mark.parametrize(
    ("names", "best"),
    [
        (
            ["model-1.safetensors", "model-2.safetensors", "model.safetensors.index.json"],
            "model.safetensors.index.json",
        ),
        (
            ["pytorch_model-1.bin", "pytorch_model-2.bin", "pytorch_model.bin.index.json"],
            "pytorch_model.bin.index.json",
        ),
        (["model.safetensors", "pytorch_model.bin", "pytorch_model.bin.index.json"], "model.safetensors"),
        (["model.safetensors", "other.safetensors"], "model.safetensors"),
        (["other.pt"], "other.pt"),
    ],
)
def test_the_best_of_a_models_folder(tmp_path, names, best):
    touch(tmp_path, *names)
    assert found(tmp_path) == {(None, best)}
    assert found(tmp_path, "t5") == {("t5", best)}


def test_a_single_file(tmp_path):
    touch(tmp_path, "x.safetensors")
    (only,) = find_checkpoints(tmp_path / "x.safetensors", "mmdit")
    assert (only.file, only.kind) == (tmp_path / "x.safetensors", "mmdit")


def test_what_cannot_be_found(tmp_path):
    with pytest.raises(OsjaxError, match="is missing: give a checkpoint"):
        find_checkpoints(tmp_path / "absent")
    with pytest.raises(OsjaxError, match="holds no checkpoint that osjax knows"):
        find_checkpoints(tmp_path)
    touch(tmp_path, "model-1.safetensors", "model-2.safetensors")
    with pytest.raises(OsjaxError, match=r"several checkpoints \(model-1\.safetensors, model-2\.safetensors\)"):
        find_checkpoints(tmp_path)


def test_a_sidecar_is_of_the_same_stem(tmp_path):
    touch(tmp_path, "Open_Sora_v2.safetensors", "config.json")
    assert find_config(tmp_path / "Open_Sora_v2.safetensors") is None
    touch(tmp_path, "Open_Sora_v2.json")
    assert find_config(tmp_path / "Open_Sora_v2.safetensors") == tmp_path / "Open_Sora_v2.json"


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"])
def test_config_json_is_the_folders(tmp_path, name):
    touch(tmp_path, name, "config.json")
    assert find_config(tmp_path / name) == tmp_path / "config.json"


@pytest.mark.parametrize(
    "content", [{"depth": 2}, {"config": {"depth": 2}, "kind": "mmdit"}], ids=["plain", "under config"]
)
def test_options(tmp_path, content):
    (tmp_path / "x.json").write_text(json.dumps(content))
    assert read_options(tmp_path / "x.json") == {"depth": 2}


@pytest.mark.parametrize("text", ["", "[1]", '{"config": 3}', "{"])
def test_unusable_options(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(OsjaxError, match=r"x\.json"):
        read_options(tmp_path / "x.json")


def test_tokenizers(tmp_path):
    touch(tmp_path, "model.safetensors", "spiece.model", "tokenizer_config.json", "config.json")
    assert [path.name for path in tokenizer_files(tmp_path / "model.safetensors")] == [
        "tokenizer_config.json",
        "spiece.model",
    ]


@pytest.mark.parametrize(
    ("said", "length"), [({"model_max_length": 64}, 64), ({"model_max_length": 1e30}, 512), ({}, 512)]
)
def test_tokens_of_a_text_encoder(tmp_path, said, length):
    assert max_length(T5, tmp_path / "model.safetensors") == 512
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(said))
    assert max_length(T5, tmp_path / "model.safetensors") == length
    assert max_length(VAE, tmp_path / "model.safetensors") is None
