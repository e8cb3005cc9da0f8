"""Times training steps of a LoRA on random full-size weights on one GPU, and says how much of the GPU they use.

    XLA_PYTHON_CLIENT_MEM_FRACTION=0.95 python launch/measure_training.py --out results.json
    python launch/measure_training.py --tiny                        # rehearsal with tiny sizes on any device

A row is a clip, a batch, and what of each block the backward pass computes again instead of finding it kept. A step is
that of `osjax.training.state.make_step`: loss, gradient of the adapter, AdamW, moving average. Seconds are the median
of steps after a warm-up, synchronised with `block_until_ready`. `peak_gb` is what the compiled step holds at once, its
arguments included, as the compiler planned it; `allocator_gb` is what the process has had at most so far, so that rows
stand in the order of what they need.

Operations are those of the blocks' projections and of attention, 2 for a multiplication and its addition. The backward
pass of a frozen projection costs what its forward pass does, since only the gradient of what enters is needed; that of
attention 2.5 times as much, its scores being computed again whatever is kept (Dao 2023, FlashAttention-2, section 4.1).
The adapter's own, about 1 %, are left out. `useful` counts the forward and the backward pass, `with_remat` the forward
pass twice. Shares are of the rate of one large matrix product in the same run.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from osjax import leaves
from osjax.kernels.attention import Attention, choose_attention
from osjax.models import lora
from osjax.models.lora import LoRA
from osjax.models.mmdit import MMDiT, MMDiTConfig, Remat
from osjax.models.rngs import ModuleRngs
from osjax.sampling.geometry import LatentGrid, image_size, latent_grid
from osjax.sampling.latents import Text
from osjax.training.flow import Clean, draw, flow_loss, grid_of
from osjax.training.options import LoRAOptions, OptimOptions
from osjax.training.remat import POLICIES
from osjax.training.state import TrainState, Weights, make_step, start

TEXT_TOKENS = 512
ADAPTER = LoRAOptions(rank=32)
OPTIM = OptimOptions()
STEPS = 1000  # of the run that the schedule of learning rates is made for
MATMUL = (8192, 3072, 21504)
PATIENCE_S = 20  # how long one figure is repeated at most
TINY = MMDiTConfig(
    vec_in_dim=32, context_in_dim=48, hidden_size=64, num_heads=2, depth=2, depth_single_blocks=2, axes_dim=(8, 12, 12)
)


@dataclasses.dataclass(frozen=True)
class Row:
    """frames: of the clip, in pixels; remat: what of each block is computed again, as `run.remat` says it."""

    size: str
    frames: int
    batch: int
    remat: str

    def __str__(self) -> str:
        return f"{self.size} × {self.frames}, batch {self.batch}, {self.remat} again"


ROWS = (
    Row("256px", 33, 1, "blocks"),
    Row("256px", 129, 1, "blocks"),
    Row("256px", 129, 1, "products"),
    Row("256px", 129, 2, "blocks"),
    Row("256px", 129, 1, "elementwise"),
    Row("256px", 33, 1, "nothing"),
    Row("768px", 129, 1, "blocks"),
    Row("256px", 129, 1, "nothing"),
)


def operations(config: MMDiTConfig, tokens: int, batch: int) -> tuple[float, float]:
    """(forward, backward) of a step on `batch` clips of `tokens` tokens each, text included; see the module."""
    blocks, width = config.depth + config.depth_single_blocks, config.hidden_size
    weights = 4 * width**2 + 2 * width * config.mlp_hidden  # those that a token meets in a block of either kind
    projections = 2.0 * batch * tokens * blocks * weights
    attention = 4.0 * batch * tokens**2 * blocks * width
    return projections + attention, projections + 2.5 * attention


def median_s(run: Callable[[], Any], runs: int) -> float:
    """Seconds of a run: the median of `runs`, or of as many as patience allows, after a warm-up."""
    jax.block_until_ready(run())
    laps: list[float] = []
    while len(laps) < runs and sum(laps) < PATIENCE_S:
        begin = time.perf_counter()
        jax.block_until_ready(run())
        laps.append(time.perf_counter() - begin)
    return statistics.median(laps)


def matmul_rate(rows: int, inner: int, columns: int, runs: int) -> float:
    """Operations a second of one bf16 product of random matrices; calls are queued, so that the host is hidden."""
    a = jax.random.normal(jax.random.key(0), (rows, inner), jnp.bfloat16)
    b = jax.random.normal(jax.random.key(1), (inner, columns), jnp.bfloat16)
    product, calls = jax.jit(jnp.matmul), 20
    return 2 * rows * inner * columns * calls / median_s(lambda: [product(a, b) for _ in range(calls)], runs)


def random_batch(config: MMDiTConfig, grid: LatentGrid, batch: int) -> tuple[Clean, Text]:
    """Random latents whose first frame is given, and random text."""
    keys = jax.random.split(jax.random.key(1), 3)
    z = jax.random.normal(keys[0], grid.noise_shape(config.latent_channels, batch))
    mask = jnp.zeros((*z.shape[:-1], 1)).at[:, 0].set(1)
    states = jax.random.normal(keys[1], (batch, TEXT_TOKENS, config.context_in_dim), jnp.bfloat16)
    pooled = jax.random.normal(keys[2], (batch, config.vec_in_dim), jnp.bfloat16)
    return Clean(z, mask, z * mask), Text(states, pooled)


@dataclasses.dataclass(frozen=True)
class Training:
    """A LoRA beside the abstract `model`, whose weights are handed in as `frozen`."""

    model: MMDiT
    attention: Attention

    def start(self) -> TrainState:
        adapter = lora.init(self.model, ADAPTER.rank, ADAPTER.alpha, ADAPTER.targets, jax.random.key(0))
        return start(adapter.arrays, OPTIM, STEPS)

    def loss(self, trained: Weights, frozen: Weights, batch: tuple[Clean, Text], key: jax.Array, remat: Remat) -> Any:
        """(loss, {}), as `make_step` asks for."""
        clean, text = batch
        adapter = LoRA.of_arrays(trained, ADAPTER.alpha / ADAPTER.rank)
        adapted = lora.attach(leaves.unflatten(self.model, frozen), adapter)
        config, clips = self.model.config, len(clean.z_bthwc)
        drawn = draw(key, grid_of(clean.z_bthwc, config.patch_size), config.latent_channels, clips)
        return flow_loss(adapted, clean, text, drawn, self.attention, remat=remat)[0], {}


def planned_gb(compiled: Any) -> float:
    """What a compiled program holds at once: arguments, intermediates, results that take no argument's place."""
    plan = compiled.memory_analysis()
    results = plan.output_size_in_bytes - plan.alias_size_in_bytes
    return (plan.argument_size_in_bytes + plan.temp_size_in_bytes + results) / 1e9


def measure(row: Row, training: Training, frozen: Weights, grid: LatentGrid, runs: int) -> dict[str, Any]:
    """Seconds and memory of a row; `failed` if the memory does not suffice, beside what was found until then."""
    loss, key = functools.partial(training.loss, remat=POLICIES[row.remat]), jax.random.key(0)
    state, batch = jax.jit(training.start)(), random_batch(training.model.config, grid, row.batch)
    step = make_step(loss, OPTIM, STEPS, key, jax.tree.map(lambda leaf: leaf.sharding, state))
    found: dict[str, Any] = {"tokens": grid.tokens + TEXT_TOKENS}

    def run() -> jax.Array:
        nonlocal state
        state, metrics = compiled(state, frozen, batch)
        return metrics["loss"]

    try:
        begin = time.perf_counter()
        once = jax.jit(lambda state, frozen, batch: step(state, frozen, [batch]), donate_argnums=0)
        compiled = once.lower(state, frozen, batch).compile()
        found |= {"compile_s": time.perf_counter() - begin, "peak_gb": planned_gb(compiled)}
        found |= {"step_s": median_s(run, runs), "loss": float(run())}
        if row.remat == "blocks":
            forward = jax.jit(loss)
            found["forward_s"] = median_s(lambda: forward(state.weights, frozen, batch, key), runs)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return found | {"failed": "out of memory"}
    stats = jax.devices()[0].memory_stats() or {}
    return found | {"allocator_gb": stats.get("peak_bytes_in_use", 0) / 1e9}


def rates(row: Row, figures: dict[str, Any], config: MMDiTConfig, matmul: float) -> dict[str, float]:
    """TFLOP/s of what a row has seconds of, and their shares of the matrix product's rate."""
    forward, backward = operations(config, figures["tokens"], row.batch)
    found = {}
    if "step_s" in figures:
        found["useful"] = (forward + backward) / figures["step_s"]
    if "forward_s" in figures:
        found["with_remat"] = (2 * forward + backward) / figures["step_s"]
        found["forward"] = forward / figures["forward_s"]
    shares = {f"{name}_share": rate / matmul for name, rate in found.items()}
    return {f"{name}_tflops": rate / 1e12 for name, rate in found.items()} | shares


def table(results: dict[str, Any]) -> str:
    """The rows as Markdown."""
    columns = "tokens", "step_s", "forward_s", "peak_gb", "useful_tflops", "useful_share", "with_remat_share", "failed"
    lines = ["| row | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|"]
    for name, figures in results["rows"].items():
        values = (figures.get(column, "") for column in columns)
        cells = (f"{value:.3g}" if isinstance(value, float) else str(value) for value in values)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join((f"matrix product: {results['matmul_tflops']:.0f} TFLOP/s", *lines))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="write the figures as JSON, after every row")
    parser.add_argument("--rows", nargs="+", type=int, default=list(range(len(ROWS))), help="which, counted from 0")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--tiny", action="store_true", help="tiny weights and sizes, to rehearse the script")
    args = parser.parse_args()
    config, device = TINY if args.tiny else MMDiTConfig(), jax.devices()[0]
    name, attention = choose_attention("auto", device, jnp.bfloat16, config.head_dim, gradient=True)

    def make() -> MMDiT:
        return MMDiT(config, rngs=ModuleRngs(0), dtype=jnp.bfloat16)

    frozen = jax.jit(lambda: leaves.flatten(make()))()
    matmul = matmul_rate(*((64, 64, 64) if args.tiny else MATMUL), args.runs)
    results = {
        "device": device.device_kind, "jax": jax.__version__, "attention": name, "rank": ADAPTER.rank,
        "tiny": args.tiny, "matmul_tflops": matmul / 1e12, "rows": {},
    }  # fmt: skip
    training = Training(nnx.eval_shape(make), attention)
    for row in (ROWS[index] for index in args.rows):
        grid = latent_grid(32, 64, 9) if args.tiny else latent_grid(*image_size(row.size, "16:9"), row.frames)
        figures = measure(row, training, frozen, grid, args.runs)
        results["rows"][str(row)] = figures | rates(row, figures, config, matmul)
        print(row, json.dumps(results["rows"][str(row)]), flush=True)
        if args.out:
            args.out.write_text(json.dumps(results, indent=2) + "\n")
    print(table(results))


if __name__ == "__main__":
    main()
