"""Conversion table of the T5 encoder, from checkpoints in the names of Hugging Face's transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from convert import hf_config
from convert.rules import Rule, Write
from osjax.models.rngs import ModuleRngs
from osjax.models.t5 import T5Config, T5Encoder

# T5Config of transformers where it differs from the published model.
_DEFAULTS = {
    "d_model": 512,
    "d_ff": 2048,
    "num_heads": 8,
    "num_layers": 6,
    "feed_forward_proj": "relu",
}
# Dropout, initialization and the decoder; `dense_act_fn` and `is_gated_act` only repeat `feed_forward_proj`.
_UNUSED = (
    "classifier_dropout",
    "dense_act_fn",
    "dropout_rate",
    "initializer_factor",
    "is_gated_act",
    "n_positions",
    "num_decoder_layers",
    "scale_decoder_outputs",
)


def read_config(options: Mapping[str, Any]) -> T5Config:
    """A T5 `config.json` -> T5Config. Raises OsjaxError for an unknown option or an unsupported activation."""
    return hf_config.read(options, T5Config, defaults=_DEFAULTS, unused=_UNUSED, model="T5")


def build(config: T5Config, dtype: jnp.dtype) -> T5Encoder:
    """The module that the rules fill; call it under `nnx.eval_shape`."""
    return T5Encoder(config, rngs=ModuleRngs(0), dtype=dtype)


def rules(config: T5Config) -> list[Rule]:
    """The table. The two names of the embedding are one tensor upstream, and a file holds either or both."""
    block = r"encoder\.block\.(?P<layer>\d+)"
    attention, feed_forward = rf"{block}\.layer\.0", rf"{block}\.layer\.1"
    in_names = {"wi_0": "wi", "wi_1": "gate"} if config.is_gated else {"wi": "wi"}
    return [
        Rule(r"shared\.weight", (_whole("embed.embedding"),)),
        Rule(r"encoder\.embed_tokens\.weight", (_whole("embed.embedding"),), alias=True),
        Rule(
            r"encoder\.block\.0\.layer\.0\.SelfAttention\.relative_attention_bias\.weight",
            (_whole("relative_bias.embedding"),),
        ),
        Rule(rf"{attention}\.SelfAttention\.(?P<name>[qkvo])\.weight", (_linear("blocks.{name}.kernel"),)),
        Rule(rf"{attention}\.layer_norm\.weight", (_whole("blocks.attention_norm.scale"),)),
        *(
            Rule(rf"{feed_forward}\.DenseReluDense\.{name}\.weight", (_linear(f"blocks.{leaf}.kernel"),))
            for name, leaf in (in_names | {"wo": "wo"}).items()
        ),
        Rule(rf"{feed_forward}\.layer_norm\.weight", (_whole("blocks.mlp_norm.scale"),)),
        Rule(r"encoder\.final_layer_norm\.weight", (_whole("final_norm.scale"),)),
        Rule(r"decoder\..+"),
        Rule(r"lm_head\..+"),
    ]


def _whole(leaf: str) -> Write:
    return Write(leaf, lambda tensor: tensor)


def _linear(leaf: str) -> Write:
    """torch Linear (out, in) -> kernel [in, out]."""
    return Write(leaf, lambda weight: weight.T)
