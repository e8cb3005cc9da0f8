"""Options of a checkpoint without a config: what names and shapes tell, and the published models' values for the rest.

Where that cannot be right (a head width that the published RoPE axes do not fit, say), the user is asked.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from osjax.errors import OsjaxError

Shapes = Mapping[str, jax.ShapeDtypeStruct]

# A tensor that every checkpoint of the kind holds and no other does.
_MARKS = {
    "mmdit": "double_blocks.0.img_mod.lin.weight",
    "hunyuan_vae": "encoder.down_blocks.0.resnets.0.conv1.conv.weight",
    "t5": "encoder.block.0.layer.0.SelfAttention.q.weight",
    "clip": "text_model.encoder.layers.0.self_attn.q_proj.weight",
    "dc_ae": "encoder.project_in.conv.weight",
    "autoencoder_2d": "encoder.down.0.block.0.norm1.weight",
}
_CONDITION = "cond_in.weight"  # an MMDiT that takes no frames as given draws pictures: FLUX


def detect_kind(names: Iterable[str]) -> str | None:
    """The kind by the tensors' names; None if it is none that is known."""
    names = frozenset(names)
    kind = next((kind for kind, mark in _MARKS.items() if mark in names), None)
    return "flux" if kind == "mmdit" and _CONDITION not in names else kind


def infer_options(kind: str, shapes: Shapes) -> dict[str, Any]:
    """Upstream's constructor options (config.json for t5 and clip) of a checkpoint, from its tensors' shapes.

    Raises OsjaxError if a tensor they are read from is missing, or if they cannot be those of a known model.
    """
    readers: dict[str, Callable[[Shapes], dict[str, Any]]] = {
        "mmdit": _mmdit,
        "flux": _mmdit,
        "hunyuan_vae": _hunyuan_vae,
        "t5": _t5,
        "clip": _clip,
        "dc_ae": _dc_ae,
        "autoencoder_2d": _autoencoder_2d,
    }
    try:
        return readers[kind](shapes)
    except (KeyError, IndexError) as error:
        raise _ask(f"the checkpoint has no {kind} tensor {error}") from error


def _mmdit(shapes: Shapes) -> dict[str, Any]:
    hidden, in_channels = shapes["img_in.weight"].shape
    cond_embed = _CONDITION in shapes
    fused = "double_blocks.0.img_attn.qkv.weight" in shapes
    head_width = shapes["double_blocks.0.img_attn.norm.query_norm.scale"].shape[0]
    if head_width != 128:
        raise _ask(f"MMDiT heads are {head_width} wide, which leaves the axes of RoPE unknown")
    # A condition token holds one mask value for each pixel of the patch beside the latent's channels.
    patch_area = shapes[_CONDITION].shape[1] - in_channels if cond_embed else 4
    if patch_area < 1 or math.isqrt(patch_area) ** 2 != patch_area:
        raise _ask(f"cond_in has {patch_area} channels more than img_in, which is no square patch")
    first_attn = "double_blocks.0.img_attn"
    return {
        "in_channels": in_channels,
        "vec_in_dim": shapes["vector_in.in_layer.weight"].shape[1],
        "context_in_dim": shapes["txt_in.weight"].shape[1],
        "hidden_size": hidden,
        "mlp_ratio": shapes["double_blocks.0.img_mlp.0.weight"].shape[0] / hidden,
        "num_heads": hidden // head_width,
        "depth": _count(shapes, r"double_blocks\.(\d+)\..*"),
        "depth_single_blocks": _count(shapes, r"single_blocks\.(\d+)\..*"),
        "axes_dim": [16, 56, 56],
        "theta": 10_000,
        "qkv_bias": f"{first_attn}.{'qkv' if fused else 'q_proj'}.bias" in shapes,
        "guidance_embed": "guidance_in.in_layer.weight" in shapes,
        "cond_embed": cond_embed,
        "fused_qkv": fused,
        "use_liger_rope": not fused,  # as in the published files: FLUX is fused and interleaved, Open-Sora v2 neither
        "patch_size": math.isqrt(patch_area),
    }


def _hunyuan_vae(shapes: Shapes) -> dict[str, Any]:
    levels = _count(shapes, r"encoder\.down_blocks\.(\d+)\..*")
    widths = [shapes[f"encoder.down_blocks.{level}.resnets.0.conv1.conv.weight"].shape[0] for level in range(levels)]
    if any(width % 32 for width in widths):
        raise _ask(f"VAE widths {widths} do not divide into the usual 32 groups of the norm")
    if levels != 4 or _count(shapes, r"encoder\.down_blocks\.(\d+)\.downsamplers\..*") != 3:
        raise _ask(f"the VAE has {levels} levels, which leaves its compression unknown")
    return {
        "in_channels": shapes["encoder.conv_in.conv.weight"].shape[1],
        "out_channels": shapes["decoder.conv_out.conv.weight"].shape[0],
        "latent_channels": shapes["post_quant_conv.weight"].shape[0],
        "layers_per_block": _count(shapes, r"encoder\.down_blocks\.0\.resnets\.(\d+)\..*"),
        "norm_num_groups": 32,
        "scale_factor": 0.476986,
        "shift_factor": 0,
        "time_compression_ratio": 4,
        "spatial_compression_ratio": 8,
        "mid_block_add_attention": any(name.startswith("encoder.mid_block.attentions.") for name in shapes),
        "block_out_channels": widths,
        "sample_size": 256,
        "sample_tsize": 64,
        "use_spatial_tiling": True,
        "use_temporal_tiling": False,
        "tile_overlap_factor": 0.25,
    }


def _t5(shapes: Shapes) -> dict[str, Any]:
    attention, feed_forward = "encoder.block.0.layer.0.SelfAttention", "encoder.block.0.layer.1.DenseReluDense"
    inner, d_model = shapes[f"{attention}.q.weight"].shape
    buckets, heads = shapes[f"{attention}.relative_attention_bias.weight"].shape
    if f"{feed_forward}.wi_0.weight" not in shapes:
        raise _ask("the T5 feed-forward layer is not gated, which leaves its activation unknown")
    embedding = "shared.weight" if "shared.weight" in shapes else "encoder.embed_tokens.weight"
    return {
        "d_model": d_model,
        "d_kv": inner // heads,
        "d_ff": shapes[f"{feed_forward}.wi_0.weight"].shape[0],
        "num_heads": heads,
        "num_layers": _count(shapes, r"encoder\.block\.(\d+)\..*"),
        "vocab_size": shapes[embedding].shape[0],
        "relative_attention_num_buckets": buckets,
        "relative_attention_max_distance": 128,
        "feed_forward_proj": "gated-gelu",
        "layer_norm_epsilon": 1e-6,
    }


def _clip(shapes: Shapes) -> dict[str, Any]:
    vocab_size, hidden = shapes["text_model.embeddings.token_embedding.weight"].shape
    if hidden % 64:
        raise _ask(f"the CLIP text model is {hidden} wide, which does not divide into the usual heads of 64")
    return {
        "hidden_size": hidden,
        "intermediate_size": shapes["text_model.encoder.layers.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": _count(shapes, r"text_model\.encoder\.layers\.(\d+)\..*"),
        "num_attention_heads": hidden // 64,
        "max_position_embeddings": shapes["text_model.embeddings.position_embedding.weight"].shape[0],
        "vocab_size": vocab_size,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
        "eos_token_id": 2,
    }


def _dc_ae(shapes: Shapes) -> dict[str, Any]:
    stages = _count(shapes, r"encoder\.stages\.(\d+)\..*"), _count(shapes, r"decoder\.stages\.(\d+)\..*")
    if stages != (6, 6):
        raise _ask(f"the DC-AE has {stages[0]} and {stages[1]} stages, which leaves its compression unknown")
    time = [False, False, False, True, True, False]
    return {
        "in_channels": shapes["encoder.project_in.conv.weight"].shape[1],
        "latent_channels": shapes["decoder.project_in.main.conv.weight"].shape[1],
        "encoder": _dc_ae_stages(shapes, "encoder") | {"temporal_downsample": time},
        "decoder": _dc_ae_stages(shapes, "decoder") | {"temporal_upsample": time},
        "scaling_factor": None,
        "use_spatial_tiling": True,  # as upstream generates with it
        "use_temporal_tiling": True,
        "spatial_tile_size": 256,
        "temporal_tile_size": 32,
        "tile_overlap_factor": 0.25,
    }


def _dc_ae_stages(shapes: Shapes, net: str) -> dict[str, Any]:
    """Widths, depths and kinds of the six stages, from the last tensor of every block."""
    last = {"ResBlock": r"main\.conv2\.norm\.weight", "EViTS5_GLU": r"local_module\.main\.point_conv\.norm\.weight"}
    blocks = [
        [
            (block, shape.shape[0])
            for block, tensor in last.items()
            for name, shape in shapes.items()
            if re.fullmatch(rf"{net}\.stages\.{stage}\.op_list\.\d+\.{tensor}", name)
        ]
        for stage in range(6)
    ]
    return {
        "width_list": [stage[0][1] for stage in blocks],
        "depth_list": [len(stage) for stage in blocks],
        "block_type": [stage[0][0] for stage in blocks],
    }


def _autoencoder_2d(shapes: Shapes) -> dict[str, Any]:
    levels = _count(shapes, r"encoder\.down\.(\d+)\..*")
    ch = shapes["encoder.conv_in.weight"].shape[0]
    return {
        "in_channels": shapes["encoder.conv_in.weight"].shape[1],
        "out_ch": shapes["decoder.conv_out.weight"].shape[0],
        "z_channels": shapes["decoder.conv_in.weight"].shape[1],
        "ch": ch,
        "ch_mult": [shapes[f"encoder.down.{i}.block.0.conv1.weight"].shape[0] // ch for i in range(levels)],
        "num_res_blocks": _count(shapes, r"encoder\.down\.0\.block\.(\d+)\..*"),
        "scale_factor": 0.3611,
        "shift_factor": 0.1159,
    }


def _count(shapes: Shapes, pattern: str) -> int:
    """How many different numbers the pattern's group takes over all names."""
    return len({match[1] for name in shapes if (match := re.fullmatch(pattern, name))})


def _ask(why: str) -> OsjaxError:
    return OsjaxError(f"{why}: give its options with --config FILE, or in a config.json beside it")
