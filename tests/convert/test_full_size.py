"""Real sizes: every published key list is matched completely by its table, and its options follow from its shapes."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from convert.infer import detect_kind, infer_options
from convert.rules import abstract, plan
from convert.stream import TABLES
from osjax import leaves
from osjax.errors import OsjaxError
from tests.parity import cases

# The key list has the autoencoder as it is trained; upstream generates with tiles, and a bundle is for that.
INFERENCE = {"use_spatial_tiling": True, "use_temporal_tiling": True}

VENDORED = Path(__file__).parents[1] / "golden" / "full_key_shapes"
GIVEN = cases.FOLDER / "full_key_shapes"


def read(file):
    manifest = json.loads(file.read_text())
    shapes = {name: jax.ShapeDtypeStruct(tuple(shape), dtype) for name, (shape, dtype) in manifest["tensors"].items()}
    return manifest, shapes


def key_lists(folder):
    return sorted((folder if folder.is_dir() else VENDORED).glob("*.json"))


def stem(file):
    return file.stem


def test_every_kind_has_a_published_key_list():
    assert {detect_kind(read(file)[1]) for file in key_lists(VENDORED)} == set(TABLES)


@pytest.mark.parametrize("file", key_lists(GIVEN), ids=stem)
def test_the_table_matches_completely(file):
    manifest, shapes = read(file)
    table = TABLES[detect_kind(shapes)]
    config = table.read_config(manifest["config"])
    found = plan(table.rules(config), shapes, leaves.flatten(abstract(table, config, jnp.bfloat16)))
    assert sum(slab.nbytes for slab in found.slabs) == 2 * manifest["num_parameters"]
    assert found.unused == ()


@pytest.mark.parametrize("file", key_lists(VENDORED), ids=stem)
def test_the_published_options_follow_from_the_shapes(file):
    manifest, shapes = read(file)
    kind = detect_kind(shapes)
    published = manifest["config"] | (INFERENCE if kind == "dc_ae" else {})
    assert TABLES[kind].read_config(infer_options(kind, shapes)) == TABLES[kind].read_config(published)


def changed(file_stem, **shapes):
    """A published key list with some tensors of another shape (None: without it)."""
    found = read(VENDORED / f"{file_stem}.json")[1]
    for name, shape in shapes.items():
        found[name] = None if shape is None else jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    return {name: shape for name, shape in found.items() if shape is not None}


@pytest.mark.parametrize(
    ("kind", "file_stem", "shapes", "message"),
    [
        (
            "mmdit",
            "Open_Sora_v2",
            {"double_blocks.0.img_attn.norm.query_norm.scale": (64,)},
            "heads are 64 wide",
        ),
        ("mmdit", "Open_Sora_v2", {"cond_in.weight": (3072, 66)}, "2 channels more than img_in"),
        ("mmdit", "Open_Sora_v2", {"txt_in.weight": None}, r"no mmdit tensor 'txt_in\.weight'"),
        (
            "hunyuan_vae",
            "hunyuan_vae",
            {"encoder.down_blocks.1.resnets.0.conv1.conv.weight": (72, 128, 3, 3, 3)},
            "do not divide into the usual 32 groups",
        ),
        (
            "hunyuan_vae",
            "hunyuan_vae",
            {"encoder.down_blocks.4.resnets.0.conv1.conv.weight": (512, 512, 3, 3, 3)},
            "5 levels",
        ),
        ("dc_ae", "F32T4C128_AE", {"encoder.stages.6.op_list.0.x": (1,)}, "7 and 6 stages"),
        (
            "t5",
            "t5-v1_1-xxl_encoder",
            {"encoder.block.0.layer.1.DenseReluDense.wi_0.weight": None},
            "is not gated",
        ),
        (
            "clip",
            "clip-vit-large-patch14_text",
            {"text_model.embeddings.token_embedding.weight": (49408, 100)},
            "is 100 wide",
        ),
    ],
)
def test_where_shapes_cannot_tell_the_user_is_asked(kind, file_stem, shapes, message):
    with pytest.raises(OsjaxError, match=rf"{message}.*give its options with --config FILE"):
        infer_options(kind, changed(file_stem, **shapes))
