"""The Video DC-AE's checkpoint: options, names and layouts of `F32T4C128_AE.safetensors`.

Upstream numbers a stage's blocks and its resampling in one list, in which the encoder's resampling comes last and the
decoder's first; 1x1x1 convolutions become matrices.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from convert.layers import convolution, norm, pointwise
from convert.options import refuse_unknown
from convert.rules import Rule, Write
from osjax.errors import OsjaxError
from osjax.models.dc_ae import DCAE, DCAEConfig, Stage
from osjax.models.dc_ae_blocks import HEAD_WIDTH
from osjax.models.rngs import ModuleRngs

# Options that the model has under the same name, and those that change nothing here: where the file lies, training.
_SAME = (
    "in_channels",
    "latent_channels",
    "scaling_factor",
    "use_spatial_tiling",
    "use_temporal_tiling",
    "spatial_tile_size",
    "temporal_tile_size",
    "tile_overlap_factor",
)
IGNORED_OPTIONS = frozenset(
    {"type", "model_name", "from_pretrained", "from_scratch", "cache_dir", "pretrained_path", "pretrained_source"}
    | {"is_training", "device_or_dtype"}
)
# What the published model fixes and nothing else is built for. Absent means the same.
_FIXED = {"use_quant_conv": False, "is_image_model": False}
_FIXED_IN_BOTH = {"norm": "rms3d", "act": "silu", "is_video": True}
_FIXED_IN = {
    "encoder": _FIXED_IN_BOTH
    | {
        "downsample_block_type": "Conv",
        "downsample_match_channel": True,
        "downsample_shortcut": "averaging",
        "out_norm": None,
        "out_act": None,
        "out_shortcut": "averaging",
        "double_latent": False,
    },
    "decoder": _FIXED_IN_BOTH
    | {
        "in_shortcut": "duplicating",
        "upsample_block_type": "InterpolateConv",
        "upsample_match_channel": True,
        "upsample_shortcut": "duplicating",
        "out_norm": "rms3d",
        "out_act": "relu",
    },
}
_TIME = {"encoder": "temporal_downsample", "decoder": "temporal_upsample"}
_IS_ATTENTION = {"ResBlock": False, "EViTS5_GLU": True}


def read_config(options: dict[str, Any]) -> DCAEConfig:
    """Upstream's constructor options -> config; absent ones take the published model's values.

    Raises OsjaxError for an option that upstream does not have, and for a value that no model here has.
    """
    nets = {name: _read_net(name, options.get(name) or {}, options) for name in _FIXED_IN}
    ratios = {"time_compression_ratio", "spatial_compression_ratio"}
    _check_options("DC-AE", options, {*_SAME, *nets, *ratios, *IGNORED_OPTIONS}, _FIXED)
    same = {name: options[name] for name in _SAME if name in options}
    config = DCAEConfig(**same, **nets["encoder"], **nets["decoder"])
    for name in sorted(ratios & set(options)):
        if options[name] != getattr(config, name):
            raise OsjaxError(
                f"{name} is {options[name]}, the stages make it {getattr(config, name)}: mend the checkpoint's config"
            )
    return config


def _read_net(name: str, options: Mapping[str, Any], outer: Mapping[str, Any]) -> dict[str, Any]:
    """Options of the encoder or the decoder -> fields of the config."""
    channels = ("in_channels", "latent_channels")
    named = {"width_list": "widths", "depth_list": "depths", "block_type": "attention", _TIME[name]: "time"}
    _check_options(f"DC-AE {name}", options, {*channels, *named}, _FIXED_IN[name])
    for option in channels:
        expected = outer.get(option, getattr(DCAEConfig, option))
        if options.get(option, expected) != expected:
            raise OsjaxError(f"the DC-AE {name}'s {option} is not the autoencoder's: mend the checkpoint's config")
    fields = {f"{name}_{field}": tuple(options[option]) for option, field in named.items() if option in options}
    if "block_type" in options:
        unknown = sorted(set(options["block_type"]) - set(_IS_ATTENTION))
        if unknown:
            raise OsjaxError(f"unknown DC-AE blocks {', '.join(unknown)}: use {' or '.join(_IS_ATTENTION)}")
        fields[f"{name}_attention"] = tuple(_IS_ATTENTION[block] for block in options["block_type"])
    return fields


def _check_options(what: str, options: Mapping[str, Any], known: set[str], fixed: Mapping[str, Any]) -> None:
    refuse_unknown(options, known.union(fixed), what)
    for option, value in fixed.items():
        if options.get(option, value) != value:
            raise OsjaxError(f"{what} option {option} is {options[option]!r}: only {value!r} is supported")


def build(config: DCAEConfig, dtype: jnp.dtype) -> DCAE:
    """The module that the rules fill; call it under `nnx.eval_shape`."""
    return DCAE(config, rngs=ModuleRngs(0), dtype=dtype)


def rules(config: DCAEConfig) -> list[Rule]:
    """The table: every tensor name of the checkpoint, and the leaf it fills."""
    table = [
        *convolution(r"encoder\.project_in\.conv", "encoder.conv_in"),
        *convolution(r"encoder\.project_out\.main\.op_list\.0\.conv", "encoder.conv_out"),
        *convolution(r"decoder\.project_in\.main\.conv", "decoder.conv_in"),
        *norm(r"decoder\.project_out\.op_list\.0", "decoder.norm_out"),
        *convolution(r"decoder\.project_out\.op_list\.2\.conv", "decoder.conv_out"),
    ]
    for i, stage in enumerate(config.encoder):
        ops = rf"encoder\.stages\.{i}\.op_list"
        table += _blocks(ops, f"encoder.stages.{i}", stage, first=0)
        table += convolution(rf"{ops}\.{stage.depth}\.main\.conv", f"encoder.downsamples.{i}.conv")
    last = len(config.decoder) - 1
    for i, stage in enumerate(config.decoder):
        ops = rf"decoder\.stages\.{i}\.op_list"
        table += _blocks(ops, f"decoder.stages.{i}", stage, first=int(i < last))
        table += convolution(rf"{ops}\.0\.main\.conv\.conv", f"decoder.upsamples.{i}.conv")
    return table


def _blocks(ops: str, stage_leaf: str, stage: Stage, first: int) -> list[Rule]:
    """The blocks of a stage, which are number `first` and following of its list."""
    block = _attention_block if stage.attention else _res_block
    return [rule for j in range(stage.depth) for rule in block(rf"{ops}\.{first + j}", f"{stage_leaf}.{j}")]


def _res_block(source: str, leaf: str) -> list[Rule]:
    return [
        *convolution(rf"{source}\.main\.(?P<conv>conv[12])\.conv", f"{leaf}.{{conv}}"),
        *norm(rf"{source}\.main\.conv2\.norm", f"{leaf}.norm"),
    ]


def _attention_block(source: str, leaf: str) -> list[Rule]:
    attention, unit = rf"{source}\.context_module\.main", rf"{source}\.local_module\.main"
    return [
        *pointwise(rf"{attention}\.qkv\.conv", f"{leaf}.attention.qkv"),
        *convolution(rf"{attention}\.aggreg\.0\.0", f"{leaf}.attention.gather"),
        Rule(rf"{attention}\.aggreg\.0\.1\.weight", (Write(f"{leaf}.attention.mix.kernel", _matrix_of_each_group),)),
        *pointwise(rf"{attention}\.proj\.conv", f"{leaf}.attention.project"),
        *norm(rf"{attention}\.proj\.norm", f"{leaf}.attention.norm"),
        *pointwise(rf"{unit}\.inverted_conv\.conv", f"{leaf}.unit.widen"),
        *convolution(rf"{unit}\.depth_conv\.conv", f"{leaf}.unit.depthwise"),
        *pointwise(rf"{unit}\.point_conv\.conv", f"{leaf}.unit.narrow"),
        *norm(rf"{unit}\.point_conv\.norm", f"{leaf}.unit.norm"),
    ]


def _matrix_of_each_group(weight: Any) -> Any:
    """torch Conv3d of size 1 in groups of HEAD_WIDTH: (groups · out, in, 1, 1, 1) -> [groups, in, out]."""
    return weight.reshape(-1, HEAD_WIDTH, HEAD_WIDTH).transpose(0, 2, 1)
