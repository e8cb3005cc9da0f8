"""FLUX's image autoencoder: options, names and layouts of `flux1-dev-ae.safetensors`.

The decoder's levels are numbered from the pixels there, in the order in which they run here; 1x1 convolutions become
matrices.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

from convert.layers import convolution, norm, pointwise
from convert.options import fields_of
from convert.rules import Rule
from osjax.models.autoencoder_2d import Autoencoder2D, Autoencoder2DConfig
from osjax.models.rngs import ModuleRngs

# Options of the reference that change nothing here: where its file lies, a size that nothing reads, and whether it
# samples the posterior, which here the caller says.
IGNORED_OPTIONS = frozenset({"from_pretrained", "cache_dir", "type", "resolution", "sample"})


def read_config(options: dict[str, Any]) -> Autoencoder2DConfig:
    """Upstream's constructor options -> config; absent ones take the published model's values.

    Raises OsjaxError for an option that upstream does not have, and for values that make no model.
    """
    return Autoencoder2DConfig(
        **fields_of(options, Autoencoder2DConfig, unused=IGNORED_OPTIONS, model="FLUX autoencoder")
    )


def build(config: Autoencoder2DConfig, dtype: jnp.dtype) -> Autoencoder2D:
    """The module that the rules fill; call it under `nnx.eval_shape`."""
    return Autoencoder2D(config, rngs=ModuleRngs(0), dtype=dtype)


def rules(config: Autoencoder2DConfig) -> list[Rule]:
    """The table: every tensor name of the checkpoint, and the leaf it fills."""
    net = r"(?P<net>encoder|decoder)"
    attention = rf"{net}\.mid\.attn_1"
    table = [
        *convolution(rf"{net}\.(?P<conv>conv_in|conv_out)", "{net}.{conv}"),
        *norm(rf"{net}\.norm_out", "{net}.norm_out"),
        *_resnet(rf"{net}\.mid\.block_1", "{net}.mid_block.resnets.0"),
        *_resnet(rf"{net}\.mid\.block_2", "{net}.mid_block.resnets.1"),
        *norm(rf"{attention}\.norm", "{net}.mid_block.attention.group_norm"),
        *pointwise(rf"{attention}\.(?P<head>[qkv])", "{net}.mid_block.attention.to_{head}"),
        *pointwise(rf"{attention}\.proj_out", "{net}.mid_block.attention.to_out"),
    ]
    levels = len(config.ch_mult)
    for i in range(levels):
        for source, leaf in (
            (rf"encoder\.down\.{i}", f"encoder.levels.{i}"),
            (rf"decoder\.up\.{i}", f"decoder.levels.{levels - 1 - i}"),
        ):
            table += _resnet(rf"{source}\.block\.(?P<j>\d+)", f"{leaf}.resnets.{{j}}")
            table += convolution(rf"{source}\.(?:down|up)sample\.conv", f"{leaf}.resample")
    return table


def _resnet(source: str, leaf: str) -> list[Rule]:
    return [
        *norm(rf"{source}\.(?P<norm>norm[12])", f"{leaf}.{{norm}}"),
        *convolution(rf"{source}\.(?P<conv>conv[12])", f"{leaf}.{{conv}}"),
        *pointwise(rf"{source}\.nin_shortcut", f"{leaf}.conv_shortcut"),
    ]
