"""Conversion table of the MMDiT: Open-Sora v2's split q/k/v or FLUX's fused projections, either RoPE layout.

The two releases differ in how projections are grouped (`fused_qkv`) and in which channel pairs RoPE rotates
(`use_liger_rope`: half-split pairs, else interleaved ones). The model rotates half-split pairs only, so interleaved q
and k rows, biases and norm scales are permuted within each head, which leaves every attention score as it was.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from convert.options import fields_of
from convert.rules import Rule, Write
from osjax.models.mmdit import MMDiT, MMDiTConfig
from osjax.models.rngs import ModuleRngs

Q, K, V = range(3)

# Constructor options of the reference that change how a checkpoint is written or run there, not what is computed.
LAYOUT_OPTIONS = frozenset({"fused_qkv", "use_liger_rope"})
IGNORED_OPTIONS = frozenset({"from_pretrained", "cache_dir", "strict_load", "device_map", "grad_ckpt_settings", "type"})


@dataclasses.dataclass(frozen=True)
class MMDiTSource:
    """The model's sizes and how the checkpoint lays its projections out."""

    model: MMDiTConfig
    fused_qkv: bool
    interleaved_rope: bool


def read_config(options: dict[str, Any]) -> MMDiTSource:
    """Upstream's constructor options → sizes and layout; absent ones take upstream's defaults (fused, interleaved).

    Raises OsjaxError for an option that upstream does not have.
    """
    sizes = fields_of(options, MMDiTConfig, unused=LAYOUT_OPTIONS | IGNORED_OPTIONS, model="MMDiT")
    return MMDiTSource(
        model=MMDiTConfig(**({"guidance_embed": False, "cond_embed": False} | sizes)),
        fused_qkv=bool(options.get("fused_qkv", True)),
        interleaved_rope=not options.get("use_liger_rope", False),
    )


def build(source: MMDiTSource, dtype: jnp.dtype) -> MMDiT:
    return MMDiT(source.model, rngs=ModuleRngs(0), dtype=dtype)


def rules(source: MMDiTSource) -> list[Rule]:
    """The table: every tensor name of the checkpoint, and the leaves it fills."""
    table = linear("img_in", "img_in") + linear("txt_in", "txt_in")
    embedders = ["time_in", "vector_in"] + ["guidance_in"] * source.model.guidance_embed
    for name in embedders:
        table += linear(rf"{name}\.in_layer", f"{name}.in_layer") + linear(rf"{name}\.out_layer", f"{name}.out_layer")
    if source.model.cond_embed:
        table += linear("cond_in", "cond_in")
    table += _double_blocks(source) + _single_blocks(source)
    table += linear(r"final_layer\.linear", "final_layer.linear")
    return table + linear(r"final_layer\.adaLN_modulation\.1", "final_layer.mod.lin")


def linear(source: str, leaf: str) -> list[Rule]:
    """torch Linear: weight (out, in) → kernel [in, out]; bias [out]."""
    return [
        Rule(rf"{source}\.weight", (Write(f"{leaf}.kernel", lambda weight: weight.T),)),
        Rule(rf"{source}\.bias", (Write(f"{leaf}.bias", lambda bias: bias),)),
    ]


def _double_blocks(source: MMDiTSource) -> list[Rule]:
    block, stream = r"double_blocks\.(?P<layer>\d+)", r"(?P<stream>img|txt)"
    attn, leaf = rf"{block}\.{stream}_attn", "double_blocks.{stream}"
    heads = source.model.hidden_size
    table = linear(rf"{block}\.{stream}_mod\.lin", f"{leaf}.mod.lin")
    table += linear(rf"{attn}\.proj", f"{leaf}.proj")
    table += linear(rf"{block}\.{stream}_mlp\.0", f"{leaf}.mlp_in")
    table += linear(rf"{block}\.{stream}_mlp\.2", f"{leaf}.mlp_out")
    table += _norms(source, rf"{attn}\.norm", f"{leaf}.qkv")
    parts = ("weight", "bias") if source.model.qkv_bias else ("weight",)
    for part in parts:
        start = heads if source.fused_qkv else 0
        q, k, v = (_project(source, f"{leaf}.qkv", part, which, start * which) for which in (Q, K, V))
        if source.fused_qkv:
            table.append(Rule(rf"{attn}\.qkv\.{part}", (q, k, v)))
        else:
            table += [Rule(rf"{attn}\.{name}_proj\.{part}", (one,)) for name, one in (("q", q), ("k", k), ("v", v))]
    return table


def _single_blocks(source: MMDiTSource) -> list[Rule]:
    block, leaf, heads = r"single_blocks\.(?P<layer>\d+)", "single_blocks", source.model.hidden_size
    table = linear(rf"{block}\.modulation\.lin", f"{leaf}.mod.lin") + linear(rf"{block}\.linear2", f"{leaf}.out")
    table += _norms(source, rf"{block}\.norm", f"{leaf}.qkv")
    for part in ("weight", "bias"):
        q, k = (_project(source, f"{leaf}.qkv", part, which, heads * which * source.fused_qkv) for which in (Q, K))
        if source.fused_qkv:
            v_and_mlp = (_project(source, f"{leaf}.qkv", part, V, 2 * heads), _mlp(leaf, part, 3 * heads))
            table.append(Rule(rf"{block}\.linear1\.{part}", (q, k, *v_and_mlp)))
        else:
            v_and_mlp = (_project(source, f"{leaf}.qkv", part, V, 0), _mlp(leaf, part, heads))
            table.append(Rule(rf"{block}\.q_proj\.{part}", (q,)))
            table.append(Rule(rf"{block}\.k_proj\.{part}", (k,)))
            table.append(Rule(rf"{block}\.v_mlp\.{part}", v_and_mlp))
    return table


def _project(source: MMDiTSource, leaf: str, part: str, which: int, start: int) -> Write:
    """Rows [start, start + H·D) of a projection → q, k or v of the leaf [F, 3, H, D] (bias [3, H, D])."""
    model = source.model
    order = _half_split_order(model.head_dim) if source.interleaved_rope and which != V else slice(None)

    def take(tensor: Any) -> Any:
        rows = tensor[start : start + model.hidden_size]
        rows = rows.reshape(model.num_heads, model.head_dim, *tensor.shape[1:])[:, order]
        return rows.transpose(2, 0, 1) if part == "weight" else rows

    if part == "weight":
        return Write(f"{leaf}.lin.kernel", take, slot=(slice(None), which))
    return Write(f"{leaf}.lin.bias", take, slot=(which,))


def _mlp(leaf: str, part: str, start: int) -> Write:
    """The rows behind the attention's: the MLP part of a single block's wide projection."""
    if part == "weight":
        return Write(f"{leaf}.mlp_in.kernel", lambda weight: weight[start:].T)
    return Write(f"{leaf}.mlp_in.bias", lambda bias: bias[start:])


def _norms(source: MMDiTSource, norm: str, leaf: str) -> list[Rule]:
    """The learned scales of q and k, permuted like the channels that they scale."""
    order = _half_split_order(source.model.head_dim) if source.interleaved_rope else slice(None)
    return [
        Rule(rf"{norm}\.query_norm\.scale", (Write(f"{leaf}.q_norm.scale", lambda scale: scale[order]),)),
        Rule(rf"{norm}\.key_norm\.scale", (Write(f"{leaf}.k_norm.scale", lambda scale: scale[order]),)),
    ]


def _half_split_order(width: int) -> np.ndarray:
    """Source channel of each target channel: interleaved 2i → i, 2i + 1 → width/2 + i."""
    return np.arange(width).reshape(-1, 2).T.ravel()
