"""Which files are chosen of what is published."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convert import layout
from osjax.errors import OsjaxError
from osjax.hub.sets import SETS, Part, parts_of

PUBLISHED = {
    "hpcai-tech/Open-Sora-v2": [
        ".gitattributes",
        "README.md",
        "Open_Sora_v2.safetensors",
        "flux1-dev-ae.safetensors",
        "flux1-dev.safetensors",
        "hunyuan_vae.safetensors",
        "google/t5-v1_1-xxl/config.json",
        "google/t5-v1_1-xxl/pytorch_model.bin",
        "google/t5-v1_1-xxl/spiece.model",
        "google/t5-v1_1-xxl/tf_model.h5",
        "openai/clip-vit-large-patch14/config.json",
        "openai/clip-vit-large-patch14/flax_model.msgpack",
        "openai/clip-vit-large-patch14/merges.txt",
        "openai/clip-vit-large-patch14/model.safetensors",
        "openai/clip-vit-large-patch14/pytorch_model.bin",
        "openai/clip-vit-large-patch14/vocab.json",
    ],
    "hpcai-tech/Open-Sora-v2-Video-DC-AE": [
        "README.md",
        "F32T4C128_AE.safetensors",
        "Open_Sora_v2_Video_DC_AE.safetensors",
    ],
}
TEXT = [
    "google/t5-v1_1-xxl/config.json",
    "google/t5-v1_1-xxl/pytorch_model.bin",
    "google/t5-v1_1-xxl/spiece.model",
    "openai/clip-vit-large-patch14/config.json",
    "openai/clip-vit-large-patch14/merges.txt",
    "openai/clip-vit-large-patch14/model.safetensors",
    "openai/clip-vit-large-patch14/vocab.json",
]


@pytest.mark.parametrize(
    ("name", "models"),
    [
        ("open-sora-v2", ["Open_Sora_v2.safetensors", "hunyuan_vae.safetensors"]),
        ("open-sora-v2-dc-ae", ["F32T4C128_AE.safetensors", "Open_Sora_v2_Video_DC_AE.safetensors"]),
        ("flux1-dev", ["flux1-dev-ae.safetensors", "flux1-dev.safetensors"]),
    ],
)
def test_each_set_is_its_models_and_the_text_encoders(name, models):
    chosen = [path for part in parts_of(name) for path in part.choose(PUBLISHED[part.repo])]
    assert sorted(chosen) == sorted(models + TEXT)


def test_the_converter_finds_open_sora_in_what_is_chosen(tmp_path):
    for part in SETS["open-sora-v2"]:
        for path in part.choose(PUBLISHED[part.repo]):
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).touch()
    found = {each.kind for each in layout.find_checkpoints(tmp_path)}
    assert {"mmdit", "hunyuan_vae", "t5", "clip"} <= found


@pytest.mark.parametrize("name", ["open-sora", "a/b/c", "/b", "a/", "../b", "a/..", "https://hub/b", "a/b c", ""])
def test_what_is_neither_a_set_nor_a_repository(name):
    with pytest.raises(OsjaxError, match="choose open-sora-v2, "):
        parts_of(name)


FOLDERS = st.sampled_from(["", "a/", "a/b/"])
NAMES = st.sampled_from(["x.safetensors", "y.bin", "y.bin.index.json", "z.pt", "config.json", "README.md", "v.mp4"])


@given(st.lists(st.builds(str.__add__, FOLDERS, NAMES), unique=True))
def test_a_folder_gives_safetensors_or_pickles_and_all_the_rest_that_is_useful(paths):
    useful = [path for path in paths if not path.endswith((".md", ".mp4"))]
    if not useful:
        with pytest.raises(OsjaxError, match="holds no"):
            Part("a/b").choose(paths)
        return
    chosen = Part("a/b").choose(paths)
    for path in paths:
        folder = path.rpartition("/")[0]
        rival = "/".join(filter(None, (folder, "x.safetensors"))) in paths
        pickled = path.endswith((".bin", ".bin.index.json", ".pt"))
        assert (path in chosen) == (path in useful and not (pickled and rival))
