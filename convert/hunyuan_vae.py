"""The Hunyuan VAE's checkpoint: options, names and layouts of `hunyuan_vae.safetensors`.

The published names stay where they can; `quant_conv` and `post_quant_conv` move into the network they belong to,
1x1x1 convolutions become matrices, and each level has one `resample` for its only up- or downsampler.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from convert.layers import convolution, norm, pointwise
from convert.options import fields_of
from convert.rules import Rule
from osjax.models.hunyuan_vae import HunyuanVAE, HunyuanVAEConfig
from osjax.models.rngs import ModuleRngs

# Options of the reference that change nothing here: where its file lies, what only training uses, what nothing reads.
IGNORED_OPTIONS = frozenset({"from_pretrained", "type", "dropout", "channel"})


def read_config(options: dict[str, Any]) -> HunyuanVAEConfig:
    """Upstream's constructor options -> config; absent ones take the published model's values.

    Raises OsjaxError for an option that upstream does not have, and for values that make no model.
    """
    known = fields_of(options, HunyuanVAEConfig, unused=IGNORED_OPTIONS, model="Hunyuan VAE")
    if isinstance(known.get("sample_size"), tuple):
        known["sample_size"] = known["sample_size"][0]  # tiles are square: upstream, too, reads the first only
    return HunyuanVAEConfig(**known)


def build(config: HunyuanVAEConfig, dtype: jnp.dtype) -> HunyuanVAE:
    return HunyuanVAE(config, rngs=ModuleRngs(0), dtype=dtype)


def rules(config: HunyuanVAEConfig) -> list[Rule]:
    """The table: every tensor name of the checkpoint, and the leaf it fills."""
    net = r"(?P<net>encoder|decoder)"
    at_level, level = rf"{net}\.(?:down|up)_blocks\.(?P<i>\d+)", "{net}.levels.{i}"
    table = [
        *convolution(rf"{net}\.(?P<conv>conv_in|conv_out)\.conv", "{net}.{conv}"),
        *convolution(rf"{at_level}\.(?:down|up)samplers\.0\.conv\.conv", f"{level}.resample"),
        *_resnet(rf"{at_level}\.resnets\.(?P<j>\d+)", f"{level}.resnets.{{j}}"),
        *_resnet(rf"{net}\.mid_block\.resnets\.(?P<j>\d+)", "{net}.mid_block.resnets.{j}"),
        *norm(rf"{net}\.conv_norm_out", "{net}.norm_out"),
        *pointwise("quant_conv", "encoder.quant_conv"),
        *pointwise("post_quant_conv", "decoder.post_quant_conv"),
    ]
    if config.mid_block_add_attention:
        source, leaf = rf"{net}\.mid_block\.attentions\.0", "{net}.mid_block.attention"
        table += norm(rf"{source}\.group_norm", f"{leaf}.group_norm")
        table += pointwise(rf"{source}\.to_(?P<head>[qkv])", f"{leaf}.to_{{head}}")
        table += pointwise(rf"{source}\.to_out\.0", f"{leaf}.to_out")
    return table


def _resnet(source: str, leaf: str) -> list[Rule]:
    return [
        *norm(rf"{source}\.(?P<norm>norm[12])", f"{leaf}.{{norm}}"),
        *convolution(rf"{source}\.(?P<conv>conv[12])\.conv", f"{leaf}.{{conv}}"),
        *pointwise(rf"{source}\.conv_shortcut\.conv", f"{leaf}.conv_shortcut"),
    ]
