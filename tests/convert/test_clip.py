"""The CLIP table: options of the text model or of both halves, and the published checkpoint's keys."""

import jax
import jax.numpy as jnp
import pytest
import transformers

from convert import clip
from convert.rules import abstract, plan
from osjax import leaves
from osjax.errors import OsjaxError
from osjax.models.clip import CLIPTextConfig
from tests.convert.full_keys import read_full_keys

PUBLISHED = {
    "_name_or_path": "openai/clip-vit-large-patch14",
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "projection_dim": 768,
    "torch_dtype": "float32",
    "vocab_size": 49408,
}


@pytest.fixture(scope="module")
def full():
    options, shapes = read_full_keys("clip-vit-large-patch14_text")
    config = clip.read_config(options)
    return config, shapes, leaves.flatten(abstract(clip, config, jnp.bfloat16))


def test_published_options_are_the_defaults():
    both_halves = {"text_config": PUBLISHED, "vision_config": {"patch_size": 14}, "logit_scale_init_value": 2.6592}
    assert clip.read_config(PUBLISHED) == clip.read_config(both_halves) == CLIPTextConfig()


def test_absent_options_take_those_of_transformers():
    assert clip.read_config({}) == clip.read_config(transformers.CLIPTextConfig().to_dict()) != CLIPTextConfig()
    assert clip.read_config(transformers.CLIPConfig().to_dict()) == clip.read_config({})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 2}, "unknown CLIP text options heads: "),
        ({"hidden_act": "relu"}, "hidden_act is 'relu': "),
        ({"eos_token_id": [2, 3]}, r"eos_token_id is \[2, 3\]: "),
    ],
)
def test_options_that_are_refused(options, message):
    with pytest.raises(OsjaxError, match=message):
        clip.read_config(options)


def test_published_keys_match_and_the_rest_of_clip_is_unused(full):
    config, shapes, targets = full
    assert plan(clip.rules(config), shapes, targets).unused == ()
    extra = [
        "text_model.embeddings.position_ids",
        "vision_model.embeddings.position_ids",
        "vision_model.encoder.layers.0.mlp.fc1.weight",
        "visual_projection.weight",
        "text_projection.weight",
        "logit_scale",
    ]
    with_extra = shapes | dict.fromkeys(extra, jax.ShapeDtypeStruct((1,), jnp.float32))
    assert set(plan(clip.rules(config), with_extra, targets).unused) == set(extra)


def test_a_missing_tensor_is_named(full):
    config, shapes, targets = full
    fewer = {name: shape for name, shape in shapes.items() if name != "text_model.encoder.layers.3.mlp.fc1.bias"}
    with pytest.raises(OsjaxError, match=r"blocks\.fc1\.bias\[3\]"):
        plan(clip.rules(config), fewer, targets)
