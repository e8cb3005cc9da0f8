"""Times the stages of a video with random full-size weights on one GPU: attention, guided steps, VAE decode.

    python launch/measure_stages.py --out results.json            # 256px and 768px, bf16, all stages
    python launch/measure_stages.py --tiny                        # rehearsal with tiny sizes on any device

Each figure is the median of runs after a first call, synchronised with `block_until_ready`, on random data. `compile_s`
is the first call less the median. Attention's rate counts 4·M²·D·H operations for M tokens.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from osjax import random_weights
from osjax.benchmark import peak_gigabytes, timed
from osjax.kernels.attention import choose_attention
from osjax.models.hunyuan_vae import HunyuanVAE, HunyuanVAEConfig
from osjax.models.mmdit import MMDiT, MMDiTConfig
from osjax.models.rope import rope_table
from osjax.parallel.mesh import MeshShape, make_mesh
from osjax.sampling import geometry, guidance, schedule
from osjax.sampling.denoise import Branches, Where, denoise

TEXT_TOKENS = 512
SIZES = {"256px": (192, 336, 129), "768px": (576, 1024, 129)}
TINY_MMDIT = MMDiTConfig(
    vec_in_dim=32, context_in_dim=48, hidden_size=64, num_heads=2, depth=2, depth_single_blocks=2, axes_dim=(8, 12, 12)
)
TINY_VAE = HunyuanVAEConfig(block_out_channels=(32, 32, 32, 32))


def figures_of(run: Callable[[], Any], runs: int) -> dict[str, Any]:
    seconds, first = timed(run, runs)
    return {"seconds": round(seconds, 5), "compile_s": round(first, 2), "runs": runs}


def measure_attention(config: MMDiTConfig, tokens: int, attend: Callable, runs: int) -> dict[str, Any]:
    shape = (1, tokens, config.num_heads, config.head_dim)
    qkv = [jax.random.normal(jax.random.key(i), shape, jnp.bfloat16) for i in range(3)]
    figures = figures_of(lambda: jax.jit(attend)(*qkv), runs)
    operations = 4 * tokens**2 * config.head_dim * config.num_heads
    return figures | {"tflops": round(operations / figures["seconds"] / 1e12, 1)}


def measure_steps(model: MMDiT, grid: geometry.LatentGrid, where: Where, runs: int) -> dict[str, Any]:
    """One guided step with one, two and three branches through the sampler's own compiled step."""
    config = model.config
    key = jax.random.key(7)
    branches = Branches(
        jax.random.normal(key, (3, 1, TEXT_TOKENS, config.context_in_dim), jnp.bfloat16),
        jax.random.normal(key, (3, 1, config.vec_in_dim), jnp.bfloat16),
        jax.random.normal(key, (3, 1, grid.tokens, config.cond_channels), jnp.bfloat16),
    )
    rope = rope_table(geometry.image_ids(grid)[None], config.axes_dim, config.theta)
    x_bnc = jax.random.normal(key, (1, grid.tokens, config.in_channels))
    levels = schedule.timesteps(50, grid.tokens_per_frame, grid.t)[10:12]
    found = {}
    for used in ((0,), (0, 1), (0, 1, 2)):
        plan = [guidance.GuidedStep(used, np.full((len(used), grid.t), 1 / len(used), np.float32))]
        run = lambda plan=plan: denoise(model, x_bnc, branches, rope, plan, levels, where)  # noqa: E731
        found[f"{len(used)}_passes"] = figures_of(run, runs if len(used) == 1 else 2)
    return found


def measure_decode(vae: HunyuanVAE, grid: geometry.LatentGrid, runs: int) -> dict[str, Any]:
    z = jax.random.normal(jax.random.key(3), grid.noise_shape(vae.config.latent_channels), jnp.bfloat16)
    return figures_of(lambda: vae.decode(z), runs)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the figures as JSON")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument(
        "--stages", nargs="+", choices=["attention", "steps", "decode"], default=["attention", "steps", "decode"]
    )
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="tiny weights and sizes, to rehearse the script")
    args = parser.parse_args()
    device = jax.devices()[0]
    config, vae_config = (TINY_MMDIT, TINY_VAE) if args.tiny else (MMDiTConfig(), HunyuanVAEConfig())
    name, attend = choose_attention(args.attention, device, jnp.bfloat16, config.head_dim)
    where = Where(make_mesh(MeshShape()), attend)
    models = random_weights.bundle_of({"vae": ("hunyuan_vae", vae_config, None), "mmdit": ("mmdit", config, None)})
    grids = {size: geometry.latent_grid(*((64, 64, 9) if args.tiny else SIZES[size])) for size in args.sizes}
    results: dict[str, Any] = {
        "device": device.device_kind, "jax": jax.__version__, "attention": name, "dtype": "bf16", "tiny": args.tiny,
    }  # fmt: skip
    for size, grid in grids.items():
        results[size] = {"tokens": grid.tokens + TEXT_TOKENS}

    def record(size: str, stage: str, figures: dict[str, Any]) -> None:
        results[size][stage] = {**figures, "peak_gb": round(peak_gigabytes() or 0, 2)}
        print(size, stage, json.dumps(results[size][stage]), flush=True)
        if args.out:
            args.out.write_text(json.dumps(results, indent=2) + "\n")

    if "attention" in args.stages:
        for size, grid in grids.items():
            record(size, "attention", measure_attention(config, grid.tokens + TEXT_TOKENS, attend, args.runs))
    if "decode" in args.stages:
        vae = random_weights.draw(models.component("vae"), where.mesh, jnp.bfloat16)
        for size, grid in grids.items():
            record(size, "decode", measure_decode(vae, grid, args.runs))
        del vae
    if "steps" in args.stages:
        model = random_weights.draw(models.component("mmdit"), where.mesh, jnp.bfloat16)
        for size, grid in grids.items():
            record(size, "steps", measure_steps(model, grid, where, args.runs))


if __name__ == "__main__":
    main()
