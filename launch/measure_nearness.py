"""How near approximate choices come to exact ones on the embedded model: step caching; products, attention in 8 bits.

    python launch/measure_nearness.py                                   # eight clips: 15 minutes on two CPU cores
    python launch/measure_nearness.py --reuse 0.08,1.7 0.2,inf,0.4      # other schedules of step caching, and limits
    python launch/measure_nearness.py --seed 43                         # other prompts
    python launch/measure_nearness.py --clips 1 --steps 3               # a rehearsal

The first held-out prompts of the evaluation are drawn together at the bundle's settings, float32, once exactly and once
with each choice. PSNR is that of a clip's frames to the exact ones; the mean and the least of the clips are told.
Attention in 8 bits rounds as the kernel does (`osjax/kernels/flash_fp8_sm90.py`), but by XLA, for heads of any width.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from osjax.kernels.flash_fp8_operands import E4M3, centred_by_head, rounded_by_head
from osjax.kernels.flash_fp8_sm90 import LOG2_LARGEST_WEIGHT
from osjax.models.quantized import PRECISIONS
from osjax.pipeline import Pipeline
from osjax.request import EXACT, SPEEDS
from osjax.sampling import caching
from osjax.sampling.caching import Reuse
from osjax.training.evaluate import base_request, held_out_prompts, request_for
from osjax.training.scoring import psnr
from osjax.video import Video

SEED = 42  # the evaluation's


def drawn(
    clips: int, steps: int | None, reuses: Sequence[Reuse], seed: int = SEED
) -> Iterator[tuple[str, list[Video]]]:
    """(choice, its clips), the exact one first; reuses: of step caching, in place of the named speeds."""
    pipeline = Pipeline.load(dtype="fp32", progress=False)
    base = base_request(pipeline, {"seed": seed} | ({} if steps is None else {"num_steps": steps}))
    exact = [request_for(base, index, prompt) for index, prompt in enumerate(held_out_prompts(clips, seed))]
    yield EXACT, pipeline.run(exact)
    *_, fast = SPEEDS
    tried = {f"{each.first:g}, {each.growth:g}, {each.limit:g}": each for each in reuses}
    for name, reuse in (tried or {name: caching.SPEEDS[name] for name in SPEEDS if name != EXACT}).items():
        with _known_as(fast, reuse):
            yield name, pipeline.run([dataclasses.replace(each, speed=fast) for each in exact])
    if tried:
        return
    in_8_bits = {name: Pipeline.load(dtype="fp32", precision=name, progress=False) for name in PRECISIONS}
    for name, small in in_8_bits.items():
        yield name, small.run(exact)
    yield "attention", _attending_in_8_bits(pipeline).run(exact)
    for speed in SPEEDS:
        choices = [dataclasses.replace(each, speed=speed) for each in exact]
        if speed != EXACT:
            yield f"{speed}, fp8", in_8_bits["fp8"].run(choices)
        yield f"{speed}, all fp8", _attending_in_8_bits(in_8_bits["fp8"]).run(choices)


def _attending_in_8_bits(pipeline: Pipeline) -> Pipeline:
    return dataclasses.replace(pipeline, where=dataclasses.replace(pipeline.where, attend=attention_in_8_bits))


def attention_in_8_bits(q_bnhd: jax.Array, k_bmhd: jax.Array, v_bmhd: jax.Array) -> jax.Array:
    """What the kernel in 8 bits gives, up to the order of its sums; shapes as `reference_attention`."""
    (q, q_scale_bh), (v, v_scale_bh) = map(rounded_by_head, (q_bnhd, v_bmhd))
    k, k_scale_bh = centred_by_head(k_bmhd)
    q, k, v = (x.astype(jnp.float32) for x in (q, k, v))
    scale_bh = q_scale_bh * k_scale_bh * q.shape[-1] ** -0.5
    scores_bhnm = jnp.einsum("bnhd,bmhd->bhnm", q, k) * scale_bh[:, :, None, None]
    weights_bhnm = jnp.exp(scores_bhnm - scores_bhnm.max(axis=-1, keepdims=True)) * 2**LOG2_LARGEST_WEIGHT
    out_bnhd = jnp.einsum("bhnm,bmhd->bnhd", weights_bhnm.astype(E4M3).astype(jnp.float32), v)
    total_bnh = weights_bhnm.sum(axis=-1).swapaxes(1, 2)
    return (out_bnhd / total_bnh[..., None] * v_scale_bh[:, None, :, None]).astype(q_bnhd.dtype)


@contextlib.contextmanager
def _known_as(speed: str, reuse: Reuse) -> Iterator[None]:
    """The sampler finds a speed by its name."""
    usual = caching.SPEEDS[speed]
    caching.SPEEDS[speed] = reuse
    try:
        yield
    finally:
        caching.SPEEDS[speed] = usual


def row(name: str, videos: Sequence[Video], exact: Sequence[Video]) -> str:
    """A choice's line of the table."""
    passes = sorted({video.provenance.forward_passes for video in videos})
    near = [psnr(a.frames, b.frames) for a, b in zip(videos, exact, strict=True)]
    return f"{name:17} {' to '.join(map(str, passes)):>15} {np.mean(near):>9.1f} {min(near):>9.1f}"


def _reuse(text: str) -> Reuse:
    return Reuse(*map(float, text.split(",")))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--steps", type=int, help="by default the bundle's")
    parser.add_argument(
        "--reuse", type=_reuse, nargs="*", default=[], help="FIRST,GROWTH or FIRST,GROWTH,LIMIT of step caching"
    )
    parser.add_argument("--seed", type=int, default=SEED, help="of prompts and videos")
    args = parser.parse_args()
    print(f"{'choice':17} {'passes in full':>15} {'mean, dB':>9} {'least, dB':>9}")
    exact: list[Video] = []
    for name, videos in drawn(args.clips, args.steps, args.reuse, args.seed):
        exact = exact or videos
        print(row(name, videos, exact), flush=True)


if __name__ == "__main__":
    main()
