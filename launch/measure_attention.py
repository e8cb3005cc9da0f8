"""Checks and times the attention implementations of this device on random data, side by side in one run.

    python launch/measure_attention.py                      # head width 128, 8 828 and 76 544 tokens (256px, 768px)
    python launch/measure_attention.py --width 64
    python launch/measure_attention.py --tokens 300         # a rehearsal, also on a CPU

A figure is the median of `--repeats` timings; in each, calls are queued one after another and awaited together, so that
what the host does between two calls is hidden. The rate counts 4·M²·D·H operations for M tokens. The error is
‖out − ref‖ / ‖ref‖ against a float32 reference over sampled queries (the first, the last and random ones), all keys.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import time
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from osjax.errors import OsjaxError
from osjax.kernels.attention import NAMES, Attention, choose_attention
from osjax.kernels.attention_ref import reference_attention

DTYPES = {"bf16": jnp.bfloat16, "fp16": jnp.float16}
SAMPLES = 64


def runnable(dtype: jnp.dtype) -> dict[str, Attention]:
    """Implementations that are worth timing here: the fused ones, else the reference."""
    found = {}
    for name in NAMES[1:]:
        try:
            found[name] = choose_attention(name, jax.devices()[0], dtype)[1]
        except OsjaxError:
            continue
    return {name: attend for name, attend in found.items() if name != "xla"} or found


def sampled_error(out: jax.Array, q: jax.Array, k: jax.Array, v: jax.Array) -> float:
    """The relative error over sampled queries; NaN where anything at all is not finite."""
    tokens = q.shape[1]
    middle = np.random.default_rng(tokens).integers(0, tokens, SAMPLES)
    rows = np.unique(
        np.concatenate([np.arange(min(SAMPLES, tokens)), np.arange(max(0, tokens - SAMPLES), tokens), middle])
    )
    with jax.default_matmul_precision("highest"):
        want = jax.jit(reference_attention)(*(x.astype(jnp.float32) for x in (q[:, rows], k, v)))
    finite = jnp.isfinite(out).all()
    return float(
        jnp.where(finite, jnp.linalg.norm(out[:, rows].astype(jnp.float32) - want) / jnp.linalg.norm(want), jnp.nan)
    )


def seconds(attend: Attention, inputs: list[jax.Array], calls: int, repeats: int) -> float:
    jax.block_until_ready([attend(*inputs) for _ in range(2)])
    laps = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(calls):
            out = attend(*inputs)
        jax.block_until_ready(out)
        laps.append((time.perf_counter() - start) / calls)
    return statistics.median(laps)


@dataclasses.dataclass(frozen=True)
class Figures:
    """Of one implementation: seconds a call, operations a second / 1e12, and the error as the module has it."""

    name: str
    seconds: float
    tflops: float
    error: float


def measured(tokens: int, heads: int, width: int, dtype: jnp.dtype, repeats: int) -> Iterator[Figures]:
    """Every implementation that is worth timing here, on the same random data."""
    keys = jax.random.split(jax.random.key(tokens), 3)
    # Drawn in bfloat16 they would be few different ones, whose rounding to 8 bits does not average out.
    inputs = [jax.random.normal(key, (1, tokens, heads, width)).astype(dtype) for key in keys]
    operations = 4 * tokens**2 * width * heads
    calls = max(1, min(50, int(1e14 // operations)))
    for name, attend in runnable(dtype).items():
        compiled = jax.jit(attend).lower(*inputs).compile()
        error = sampled_error(compiled(*inputs), *inputs)
        took = seconds(compiled, inputs, calls, repeats)
        yield Figures(name, took, operations / took / 1e12, error)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", nargs="+", type=int, default=[8828, 76544])
    parser.add_argument("--heads", type=int, default=24)
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}, {args.dtype}, {args.heads} heads × {args.width}")
    print(f"{'tokens':>7}  {'attention':9}  {'ms':>8}  {'TFLOP/s':>7}  error")
    for tokens in args.tokens:
        for each in measured(tokens, args.heads, args.width, DTYPES[args.dtype], args.repeats):
            figures = f"{each.seconds * 1e3:8.3f}  {each.tflops:7.1f}  {each.error:.1e}"
            print(f"{tokens:7}  {each.name:9}  {figures}", flush=True)


if __name__ == "__main__":
    main()
