"""The MMDiT in plain eager PyTorch, timed on the device that everything else is timed on: what osjax is compared with.

    python -m launch.torch_baseline 256px --out figures.json

One forward pass of the three guidance branches together (a batch of 3), as the reference takes it: random weights of
the published size, bf16, `scaled_dot_product_attention` with cuDNN's kernel, nothing compiled. The modules are named as
those of `osjax/models/mmdit.py`. Without CUDA the figure is null and says why; `--tiny` is a rehearsal on a CPU.

B batch, N image tokens, L text tokens, M = L + N, F features, H heads, D head width.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from launch.measure_performance import SIZES
from launch.performance_sizes import TEXT_TOKENS, entry, grid_of, models_of
from osjax.models.mmdit import TIME_EMBEDDING_WIDTH, MMDiTConfig
from osjax.models.rope import rope_table
from osjax.sampling.geometry import LatentGrid, image_ids

BRANCHES = 3
EPSILON = 1e-6


def modulated(x_bnf: torch.Tensor, shift_bf: torch.Tensor, scale_bf: torch.Tensor) -> torch.Tensor:
    normed = functional.layer_norm(x_bnf, x_bnf.shape[-1:], eps=EPSILON)
    return (1 + scale_bf[:, None]) * normed + shift_bf[:, None]


def rotate(x_bhnd: torch.Tensor, cos_nd: torch.Tensor, sin_nd: torch.Tensor) -> torch.Tensor:
    first, second = x_bhnd.float().chunk(2, dim=-1)
    turned = (first * cos_nd - second * sin_nd, second * cos_nd + first * sin_nd)
    return torch.cat(turned, dim=-1).to(x_bhnd.dtype)


def attention(q_bhmd: torch.Tensor, k_bhmd: torch.Tensor, v_bhmd: torch.Tensor) -> torch.Tensor:
    """[B, H, M, D] each → [B, M, H·D]."""
    return functional.scaled_dot_product_attention(q_bhmd, k_bhmd, v_bhmd).transpose(1, 2).flatten(2)


class Modulation(nn.Module):
    def __init__(self, size: int, parts: int):
        super().__init__()
        self.lin, self.parts = nn.Linear(size, parts * size), parts

    def forward(self, vec_bf: torch.Tensor) -> Sequence[torch.Tensor]:
        return self.lin(functional.silu(vec_bf)).chunk(self.parts, dim=-1)


class QKV(nn.Module):
    """[B, N, F] → three of [B, H, N, D], queries and keys normalised."""

    def __init__(self, config: MMDiTConfig, *, bias: bool):
        super().__init__()
        self.lin = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=bias)
        self.q_norm, self.k_norm = (nn.RMSNorm(config.head_dim, eps=EPSILON) for _ in range(2))
        self.heads = config.num_heads

    def forward(self, x_bnf: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        q, k, v = self.lin(x_bnf).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return self.q_norm(q), self.k_norm(k), v


class Stream(nn.Module):
    def __init__(self, config: MMDiTConfig):
        super().__init__()
        size = config.hidden_size
        self.mod, self.qkv = Modulation(size, 6), QKV(config, bias=config.qkv_bias)
        self.proj = nn.Linear(size, size)
        self.mlp_in, self.mlp_out = nn.Linear(size, config.mlp_hidden), nn.Linear(config.mlp_hidden, size)

    def finish(self, x_bnf: torch.Tensor, attended_bnf: torch.Tensor, mod: Sequence[torch.Tensor]) -> torch.Tensor:
        x_bnf = x_bnf + mod[2][:, None] * self.proj(attended_bnf)
        hidden = functional.gelu(self.mlp_in(modulated(x_bnf, mod[3], mod[4])), approximate="tanh")
        return x_bnf + mod[5][:, None] * self.mlp_out(hidden)


class DoubleBlock(nn.Module):
    def __init__(self, config: MMDiTConfig):
        super().__init__()
        self.img, self.txt = Stream(config), Stream(config)

    def forward(self, img_bnf, txt_blf, vec_bf, cos_nd, sin_nd):  # noqa: ANN201
        img_mod, txt_mod = self.img.mod(vec_bf), self.txt.mod(vec_bf)
        text = self.txt.qkv(modulated(txt_blf, *txt_mod[:2]))
        q, k, v = self.img.qkv(modulated(img_bnf, *img_mod[:2]))
        image = rotate(q, cos_nd, sin_nd), rotate(k, cos_nd, sin_nd), v
        joint_bmf = attention(*(torch.cat(pair, dim=2) for pair in zip(text, image, strict=True)))
        txt, img = joint_bmf.split([txt_blf.shape[1], img_bnf.shape[1]], dim=1)
        return self.img.finish(img_bnf, img, img_mod), self.txt.finish(txt_blf, txt, txt_mod)


class SingleBlock(nn.Module):
    def __init__(self, config: MMDiTConfig):
        super().__init__()
        size = config.hidden_size
        self.mod, self.qkv = Modulation(size, 3), QKV(config, bias=True)
        self.mlp_in, self.out = nn.Linear(size, config.mlp_hidden), nn.Linear(size + config.mlp_hidden, size)

    def forward(self, x_bmf, vec_bf, cos_md, sin_md):  # noqa: ANN201
        shift, scale, gate = self.mod(vec_bf)
        y_bmf = modulated(x_bmf, shift, scale)
        q, k, v = self.qkv(y_bmf)
        attended = attention(rotate(q, cos_md, sin_md), rotate(k, cos_md, sin_md), v)
        hidden = functional.gelu(self.mlp_in(y_bmf), approximate="tanh")
        return x_bmf + gate[:, None] * self.out(torch.cat([attended, hidden], dim=-1))


class Embedder(nn.Module):
    def __init__(self, inputs: int, size: int):
        super().__init__()
        self.in_layer, self.out_layer = nn.Linear(inputs, size), nn.Linear(size, size)

    def forward(self, x_bc: torch.Tensor) -> torch.Tensor:
        return self.out_layer(functional.silu(self.in_layer(x_bc)))


class FinalLayer(nn.Module):
    def __init__(self, config: MMDiTConfig):
        super().__init__()
        self.mod = Modulation(config.hidden_size, 2)
        self.linear = nn.Linear(config.hidden_size, config.in_channels)

    def forward(self, x_bnf: torch.Tensor, vec_bf: torch.Tensor) -> torch.Tensor:
        return self.linear(modulated(x_bnf, *self.mod(vec_bf)))


class MMDiT(nn.Module):
    """Of a model with conditions and without embedded guidance, as Open-Sora 2.0 is."""

    def __init__(self, config: MMDiTConfig):
        super().__init__()
        size = config.hidden_size
        self.img_in, self.txt_in = nn.Linear(config.in_channels, size), nn.Linear(config.context_in_dim, size)
        self.cond_in = nn.Linear(config.cond_channels, size)
        self.time_in, self.vector_in = Embedder(TIME_EMBEDDING_WIDTH, size), Embedder(config.vec_in_dim, size)
        self.double_blocks = nn.ModuleList(DoubleBlock(config) for _ in range(config.depth))
        self.single_blocks = nn.ModuleList(SingleBlock(config) for _ in range(config.depth_single_blocks))
        self.final_layer = FinalLayer(config)

    def forward(self, x_bnc, txt_blc, vec_bp, t_b, cond_bnc, cos_nd, sin_nd):  # noqa: ANN201
        vec_bf = self.time_in(timestep_embedding(t_b).to(x_bnc.dtype)) + self.vector_in(vec_bp)
        img_bnf, txt_blf = self.img_in(x_bnc) + self.cond_in(cond_bnc), self.txt_in(txt_blc)
        for block in self.double_blocks:
            img_bnf, txt_blf = block(img_bnf, txt_blf, vec_bf, cos_nd, sin_nd)
        length = txt_blf.shape[1]
        cos_md = functional.pad(cos_nd, (0, 0, length, 0), value=1.0)
        sin_md = functional.pad(sin_nd, (0, 0, length, 0))
        x_bmf = torch.cat([txt_blf, img_bnf], dim=1)
        for block in self.single_blocks:
            x_bmf = block(x_bmf, vec_bf, cos_md, sin_md)
        return self.final_layer(x_bmf[:, length:], vec_bf)


def timestep_embedding(t_b: torch.Tensor) -> torch.Tensor:
    half = TIME_EMBEDDING_WIDTH // 2
    frequencies = torch.exp(-math.log(10_000.0) * torch.arange(half, device=t_b.device, dtype=torch.float32) / half)
    angles_bf = t_b.float()[:, None] * 1000.0 * frequencies
    return torch.cat([angles_bf.cos(), angles_bf.sin()], dim=-1)


def forward_seconds(config: MMDiTConfig, grid: LatentGrid, runs: int, device: str) -> list[float]:
    """Of `runs` forward passes of all branches after a first one."""
    rope = rope_table(image_ids(grid), config.axes_dim, config.theta)
    cos_nd, sin_nd = (torch.tensor(np.asarray(table), device=device) for table in rope)
    shapes = (
        (grid.tokens, config.in_channels), (TEXT_TOKENS, config.context_in_dim), (config.vec_in_dim,), (),
        (grid.tokens, config.cond_channels),
    )  # fmt: skip
    kernel = sdpa_kernel(SDPBackend.CUDNN_ATTENTION) if device == "cuda" else contextlib.nullcontext()
    torch.set_default_dtype(torch.bfloat16)
    laps = []
    with torch.device(device), torch.inference_mode(), kernel:
        model, inputs = MMDiT(config), [torch.rand(BRANCHES, *shape) for shape in shapes]
        for _ in range(runs + 1):
            start = time.perf_counter()
            model(*inputs, cos_nd, sin_nd)
            if device == "cuda":
                torch.cuda.synchronize()
            laps.append(time.perf_counter() - start)
    return laps[1:]


def report(size: str, runs: int, *, tiny: bool) -> dict[str, Any]:
    """As `performance_stages` writes it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not tiny:
        return {"figures": {"torch_forward_s": entry(None, "left out: PyTorch finds no CUDA device")}}
    config, grid = models_of(tiny)["mmdit"][1], grid_of(size, tiny=tiny)
    laps = forward_seconds(config, grid, runs, device)
    kernel = "cuDNN's attention" if device == "cuda" else "any attention"
    how = f"median of {runs} after a first: plain eager PyTorch, the three branches as one batch, {kernel}"
    peak = round(torch.cuda.max_memory_allocated() / 1e9, 2) if device == "cuda" else None
    versions = {"torch": torch.__version__}
    if device == "cuda":
        versions |= {"cuda": torch.version.cuda, "cudnn": str(torch.backends.cudnn.version())}
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "versions": versions,
        "figures": {"torch_forward_s": entry(statistics.median(laps), how, peak_gb=peak)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tiny", action="store_true", help="a small model and few tokens, on a CPU too")
    args = parser.parse_args()
    args.out.write_text(json.dumps(report(args.size, args.runs, tiny=args.tiny)))


if __name__ == "__main__":
    main()
