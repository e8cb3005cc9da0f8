"""Conversion table of CLIP's text model, from checkpoints in the names of Hugging Face's transformers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from convert import hf_config
from convert.rules import Rule, Write
from osjax.errors import OsjaxError
from osjax.models.clip import CLIPText, CLIPTextConfig
from osjax.models.rngs import ModuleRngs

# CLIPTextConfig of transformers where it differs from the published model.
_DEFAULTS = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8, "eos_token_id": 49407}
# Dropout, initialization, and the projection that the pooled vector does not pass.
_UNUSED = ("attention_dropout", "dropout", "initializer_factor", "initializer_range", "projection_dim")

_LINEARS = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "out_proj": "out"}


def read_config(options: Mapping[str, Any]) -> CLIPTextConfig:
    """A CLIP `config.json`, of the text model or of both halves, -> CLIPTextConfig.

    Raises OsjaxError for an unknown option of the text model, an unsupported activation or several end-of-text ids.
    """
    options = options.get("text_config", options)
    config = hf_config.read(options, CLIPTextConfig, defaults=_DEFAULTS, unused=_UNUSED, model="CLIP text")
    if not isinstance(config.eos_token_id, int):
        raise OsjaxError(f"CLIP eos_token_id is {options['eos_token_id']!r}: give one id in its config.json")
    return config


def build(config: CLIPTextConfig, dtype: jnp.dtype) -> CLIPText:
    """The module that the rules fill; call it under `nnx.eval_shape`."""
    return CLIPText(config, rngs=ModuleRngs(0), dtype=dtype)


def rules(config: CLIPTextConfig) -> list[Rule]:
    """The table; of a checkpoint with both halves, the vision model and the projections are left unused."""
    embeddings = r"text_model\.embeddings"
    layer = r"text_model\.encoder\.layers\.(?P<layer>\d+)"
    return [
        Rule(rf"{embeddings}\.token_embedding\.weight", (_whole("token_embed.embedding"),)),
        Rule(rf"{embeddings}\.position_embedding\.weight", (_whole("position_embed.embedding"),)),
        *_norm(rf"{layer}\.layer_norm1", "blocks.attention_norm"),
        *(
            rule
            for name, leaf in _LINEARS.items()
            for rule in _linear(rf"{layer}\.self_attn\.{name}", f"blocks.{leaf}")
        ),
        *_norm(rf"{layer}\.layer_norm2", "blocks.mlp_norm"),
        *_linear(rf"{layer}\.mlp\.fc1", "blocks.fc1"),
        *_linear(rf"{layer}\.mlp\.fc2", "blocks.fc2"),
        *_norm(r"text_model\.final_layer_norm", "final_norm"),
        Rule(rf"{embeddings}\.position_ids"),
        Rule(r"vision_model\..+"),
        Rule(r"(text|visual)_projection\.weight"),
        Rule(r"logit_scale"),
    ]


def _whole(leaf: str) -> Write:
    return Write(leaf, lambda tensor: tensor)


def _norm(source: str, leaf: str) -> list[Rule]:
    return [Rule(rf"{source}\.weight", (_whole(f"{leaf}.scale"),)), Rule(rf"{source}\.bias", (_whole(f"{leaf}.bias"),))]


def _linear(source: str, leaf: str) -> list[Rule]:
    """torch Linear (out, in) -> kernel [in, out], and its bias."""
    return [
        Rule(rf"{source}\.weight", (Write(f"{leaf}.kernel", lambda weight: weight.T),)),
        Rule(rf"{source}\.bias", (_whole(f"{leaf}.bias"),)),
    ]
