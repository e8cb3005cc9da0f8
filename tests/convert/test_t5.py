"""The T5 table: options, the two names of the embedding, and the published checkpoint's keys."""

import jax
import jax.numpy as jnp
import pytest
import transformers

from convert import t5
from convert.rules import abstract, plan
from osjax import leaves
from osjax.errors import OsjaxError
from osjax.models.t5 import T5Config
from tests.convert.full_keys import read_full_keys

PUBLISHED = {
    "architectures": ["T5ForConditionalGeneration"],
    "d_ff": 10240,
    "d_kv": 64,
    "d_model": 4096,
    "decoder_start_token_id": 0,
    "dropout_rate": 0.1,
    "eos_token_id": 1,
    "feed_forward_proj": "gated-gelu",
    "initializer_factor": 1.0,
    "is_encoder_decoder": True,
    "layer_norm_epsilon": 1e-06,
    "model_type": "t5",
    "num_decoder_layers": 24,
    "num_heads": 64,
    "num_layers": 24,
    "output_past": True,
    "pad_token_id": 0,
    "relative_attention_num_buckets": 32,
    "tie_word_embeddings": False,
    "use_cache": True,
    "vocab_size": 32128,
}


@pytest.fixture(scope="module")
def full():
    options, shapes = read_full_keys("t5-v1_1-xxl_encoder")
    config = t5.read_config(options)
    return config, shapes, leaves.flatten(abstract(t5, config, jnp.bfloat16))


def plan_with(full, shapes):
    return plan(t5.rules(full[0]), shapes, full[2])


def test_published_options_are_the_defaults():
    assert t5.read_config(PUBLISHED) == T5Config()


def test_absent_options_take_those_of_transformers():
    assert t5.read_config({}) == t5.read_config(transformers.T5Config().to_dict()) != T5Config()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_layerz": 2}, "unknown T5 options num_layerz: "),
        ({"feed_forward_proj": "gelu"}, "feed_forward_proj is 'gelu': "),
        ({"pruned_heads": {"0": [1]}}, "pruned heads"),
    ],
)
def test_options_that_are_refused(options, message):
    with pytest.raises(OsjaxError, match=message):
        t5.read_config(options)


def test_published_keys_match(full):
    assert plan_with(full, full[1]).unused == ()


def test_the_decoder_is_unused(full):
    extra = dict.fromkeys(
        ["decoder.block.0.layer.0.SelfAttention.q.weight", "lm_head.weight"], full[1]["shared.weight"]
    )
    assert set(plan_with(full, full[1] | extra).unused) == set(extra)


def test_either_name_of_the_embedding_will_do(full):
    alias = "encoder.embed_tokens.weight"
    both = full[1] | {alias: full[1]["shared.weight"]}
    assert plan_with(full, both).unused == (alias,)
    only_alias = {name: shape for name, shape in both.items() if name != "shared.weight"}
    assert plan_with(full, only_alias).unused == ()
    neither = {name: shape for name, shape in only_alias.items() if name != alias}
    with pytest.raises(OsjaxError, match=r"embed\.embedding"):
        plan_with(full, neither)


def test_only_the_first_block_has_a_position_bias(full):
    bias = "encoder.block.{}.layer.0.SelfAttention.relative_attention_bias.weight"
    with pytest.raises(OsjaxError, match=r"unknown tensors: encoder\.block\.1\."):
        plan_with(full, full[1] | {bias.format(1): full[1][bias.format(0)]})


def test_relu_has_one_input_projection():
    config = T5Config(d_model=8, d_kv=4, d_ff=16, num_heads=2, num_layers=1, vocab_size=4, feed_forward_proj="relu")
    table = {rule.source for rule in t5.rules(config)}
    assert any(source.endswith(r"DenseReluDense\.wi\.weight") for source in table)
    assert not any("wi_" in source for source in table)
    module = leaves.flatten(abstract(t5, config, jnp.float32))
    assert "blocks.wi.kernel" in module
    assert "blocks.gate.kernel" not in module
    assert isinstance(module["blocks.wi.kernel"], jax.ShapeDtypeStruct)
