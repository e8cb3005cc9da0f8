"""One stage of `launch/measure_performance.py`, in a process of its own, so that its peak of memory is its own too.

    python -m launch.performance_stages forward 256px --out figures.json
    python -m launch.performance_stages forward 256px --out figures.json --tiny     # on any device

Random weights of the published size, bf16, B = 1, 16:9, 129 frames, 512 text tokens. A figure is the median of `--runs`
after a first one, whose compiling (or reading from JAX's persistent cache, if one is set) `compile_s` tells; what was
computed says so. `counts` and `ceilings` make the roofline: operations and bytes of each stage, read off traces, and
what the device does at most.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import math
import platform
import shlex
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from launch import measure_attention, performance_machine, performance_start, roofline
from launch.measure_performance import SIZES
from launch.performance_sizes import SMALL, TEXT_TOKENS, Figures, entry, grid_of, models_of
from osjax import benchmark, random_weights, room
from osjax.benchmark import peak_gigabytes, timed
from osjax.cli import trial
from osjax.kernels.attention import why_not
from osjax.kernels.convolution import xla_convolution
from osjax.liveness import tree_bytes
from osjax.models.conv3d import convolved_by
from osjax.models.hunyuan_vae import HunyuanVAE
from osjax.models.mmdit import MMDiT
from osjax.models.quantized import FULL
from osjax.models.rope import Rope, rope_table
from osjax.parallel.mesh import MeshShape, make_mesh
from osjax.pipeline import Pipeline, Texts, encode_ids
from osjax.preflight import GB
from osjax.request import Request
from osjax.residency import abstract_model
from osjax.sampling import geometry, schedule
from osjax.sampling.caching import Reuse
from osjax.sampling.denoise import denoise
from osjax.sampling.guidance import GuidedStep
from osjax.sampling.latents import Text
from osjax.sampling.step import Branches, Where

ALWAYS, NEVER = Reuse(0, math.inf), Reuse(1, math.inf)  # cut short, every pass but the first
SETTLING = 2  # steps before those that are timed: the first compiles, the second may for another layout of the cache
KEYS = {"pallas": "attention", "cudnn": "cudnn", "xla": "xla", "fp8": "attention_fp8"}  # attention → figure


def attention(size: str, runs: int, *, tiny: bool) -> Figures:
    config = models_of(tiny)["mmdit"][1]
    tokens, repeats = grid_of(size, tiny=tiny).tokens + TEXT_TOKENS, max(runs, 7)
    found = {
        f"{KEYS[each.name]}_tflops": entry(
            each.tflops,
            f"{each.name}: median of {repeats}, calls queued; {tokens} tokens",
            seconds=each.seconds,
            relative_error=float(f"{each.error:.2g}"),
        )
        for each in measure_attention.measured(tokens, config.num_heads, config.head_dim, jnp.bfloat16, repeats)
    }
    none = entry(None, f"this kernel does not run on {jax.devices()[0].device_kind}")
    return dict.fromkeys(("attention_tflops", "cudnn_tflops"), none) | found


def forward(size: str, runs: int, *, tiny: bool) -> Figures:
    """A pass through the sampler's own compiled step; with step caching, one in full and one that is cut short."""
    found = {}
    with _stepper(size, runs, tiny, FULL) as step:
        found["forward_s"], _ = step("auto", None)
        for key, reuse, full in (("forward_kept_s", NEVER, runs + SETTLING), ("forward_cut_s", ALWAYS, 1)):
            figure, computed = step("auto", reuse)
            if computed != full:
                raise RuntimeError(f"{computed} passes were computed in full in place of {full}")
            what = "cut short behind the first block" if reuse is ALWAYS else "in full, with what it adds kept"
            found[key] = figure | {"how": f"{figure['how']}; step caching, {what}"}
    return found


def forward_fp8(size: str, runs: int, *, tiny: bool) -> Figures:
    """A pass with products in 8 bits, and one with attention in 8 bits too, where that runs."""
    head, device = models_of(tiny)["mmdit"][1].head_dim, jax.devices()[0]
    attention = "auto" if why_not("fp8", device, jnp.bfloat16, head) else "fp8"
    with _stepper(size, runs, tiny, "fp8") as step:
        return {"forward_fp8_products_s": step("auto", None)[0], "forward_fp8_s": step(attention, None)[0]}


@contextlib.contextmanager
def _stepper(
    size: str, runs: int, tiny: bool, precision: str
) -> Iterator[Callable[[str, Reuse | None], tuple[dict[str, Any], int]]]:
    """A function of attention and reuse that measures a pass: (its figure, passes computed in full)."""
    models = random_weights.bundle_of({"mmdit": models_of(tiny)["mmdit"]})
    mesh, grid = make_mesh(MeshShape()), grid_of(size, tiny=tiny)
    residency = random_weights.residency(models, mesh, jnp.bfloat16, offload=False, precision=precision)
    with residency.on_device("mmdit") as model:

        def step(attention: str, reuse: Reuse | None) -> tuple[dict[str, Any], int]:
            pipeline = Pipeline.over(residency, mesh, "bf16", attention, trial.RANDOM, progress=False)
            how = f"median of {runs} steps of one pass in the sampler, after {SETTLING}; attention {pipeline.attention}"
            seconds, first, computed = _step_seconds(model, grid, pipeline.where, runs, reuse)
            how += "" if precision == FULL else f", precision {precision}"
            more = {"compile_s": round(first, 2), "peak_gb": _rounded(peak_gigabytes())}
            return entry(seconds, how, **more), computed

        yield step


def _step_seconds(
    model: MMDiT, grid: geometry.LatentGrid, where: Where, runs: int, reuse: Reuse | None
) -> tuple[float, float, int]:
    """(median of a step, what the first took beyond it, passes computed in full), each step of one branch of three."""
    config, key = model.config, jax.random.key(7)
    branches = Branches(
        jax.random.normal(key, (3, 1, TEXT_TOKENS, config.context_in_dim), jnp.bfloat16),
        jax.random.normal(key, (3, 1, config.vec_in_dim), jnp.bfloat16),
        jax.random.normal(key, (3, 1, grid.tokens, config.cond_channels), jnp.bfloat16),
    )
    rope = rope_table(geometry.image_ids(grid)[None], config.axes_dim, config.theta)
    x_bnc = jax.random.normal(key, (1, grid.tokens, config.in_channels))
    plan = [GuidedStep((0,), np.ones((1, grid.t), np.float32))] * (runs + SETTLING)
    levels = schedule.timesteps(max(50, len(plan) + 10), grid.tokens_per_frame, grid.t)[10 : len(plan) + 11]
    ends = [time.perf_counter()]
    told = lambda *_: ends.append(time.perf_counter())  # noqa: E731
    _, computed = denoise(model, x_bnc, branches, rope, plan, levels, where, on_step=told, reuse=reuse)
    laps = [end - start for start, end in itertools.pairwise(ends)]
    median = statistics.median(laps[SETTLING:])
    return median, max(0.0, laps[0] - median), computed


def decode(size: str, runs: int, *, tiny: bool) -> Figures:
    vae = _autoencoder(tiny)
    z_bthwc = jax.random.normal(jax.random.key(3), grid_of(size, tiny=tiny).noise_shape(vae.config.latent_channels))
    seconds, first = timed(lambda: vae.decode(z_bthwc), runs)
    peak, weights = peak_gigabytes(), tree_bytes(vae) / GB
    beyond = None if peak is None else peak - weights
    how = "most that this process had on the device, less the autoencoder's weights" if peak else "devices do not tell"
    return {
        "vae_decode_s": entry(seconds, f"median of {runs} after a first, upstream's tiles", compile_s=round(first, 2)),
        "vae_decode_peak_gb": entry(beyond, how, weights_gb=_rounded(weights)),
    }


def decode_check(size: str, runs: int, *, tiny: bool) -> Figures:
    """How far decoding by this device's convolutions is from XLA's, on latents of 5 frames of 8 x 8."""
    del size, runs
    vae = _autoencoder(tiny)
    z_bthwc = jax.random.normal(jax.random.key(3), (1, 5, 8, 8, vae.config.latent_channels))
    found, wanted = (np.asarray(each.decode(z_bthwc), np.float32) for each in (vae, convolved_by(vae, xla_convolution)))
    error = float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))
    return {"vae_decode_error": entry(error, "Euclidean norm of the difference by that of XLA's frames, bf16")}


def _autoencoder(tiny: bool) -> HunyuanVAE:
    """As the pipeline has it on this device."""
    bundle, mesh = random_weights.bundle_of({"vae": models_of(tiny)["vae"]}), make_mesh(MeshShape())
    with random_weights.residency(bundle, mesh, jnp.bfloat16, offload=False).on_device("vae") as vae:
        return vae


def video(size: str, runs: int, *, tiny: bool, options: Sequence[str] = (), kind: str = "t2v") -> Figures:
    """The whole pipeline part by part, as `osjax bench --random_weights True` does it."""
    pipeline, requests = _drawer(size, kind, tiny, options)
    measured = benchmark.measure(pipeline, requests, runs)
    parts = {part.name: {"seconds": _rounded(part.seconds, 5), "times": part.times} for part in measured.parts}
    blocks = ", the transformer block by block" if pipeline.in_blocks(requests) else ""
    offload = f"offload {pipeline.residency.offload}{blocks}, attention {pipeline.attention}"
    how = f"summed: medians of {runs} of each part, as often as a video needs it, {measured.passes} passes; {offload}"
    peak = measured.parts[-1].peak
    told = "most that the process had on the device, all parts" if peak else "devices do not tell"
    key = "peak_gb" if kind == "t2v" else f"{kind[:3]}_peak_gb"
    found = {
        f"{kind[:3]}_exact_s": entry(measured.seconds, how, measured=False, passes=measured.passes, parts=parts),
        key: entry(peak, f"{told}; {offload}"),
    }
    once = {"text": "both encoders, one set of texts", "reference": "one picture"}
    for part in measured.parts:
        if part.name in once:
            found[f"{part.name}_s"] = entry(part.seconds, f"median of {runs}: {once[part.name]}; {offload}")
    if kind == "t2v":
        rest = sum(part.in_all for part in measured.parts if not part.name.startswith("step"))
        found["t2v_rest_s"] = entry(rest, "summed: texts and decoding", measured=False, passes=measured.passes)
    return found


def limited(size: str, runs: int, *, tiny: bool, stage: str) -> Figures:
    """The same with offloading, in what memory there is."""
    found = video(size, runs, tiny=tiny, options=() if tiny else ("--offload", "True"))
    there = room.memory(jax.devices()[0])
    limit = "a limit that the device does not tell" if there is None else f"at most {there.total:.1f} GB"
    names = {f"{stage}_s": "t2v_exact_s", f"{stage}_peak_gb": "peak_gb"}
    return {key: found[name] | {"how": f"{found[name]['how']}; in {limit}"} for key, name in names.items()}


def whole(size: str, runs: int, *, tiny: bool, options: Sequence[str] = ()) -> Figures:
    """One video drawn from its first text to its last pixel, after one of two steps that compiles."""
    del runs
    pipeline, (request,) = _drawer(size, "t2v", tiny, options)
    short = dataclasses.replace(request, num_steps=2)
    pipeline.run([short], _texts(pipeline))
    start = time.perf_counter()
    (drawn,) = pipeline.run([request], _texts(pipeline))
    seconds, passes = time.perf_counter() - start, drawn.provenance.forward_passes
    how = f"one video drawn as a whole, {passes} passes, after one of 2 steps; offload {pipeline.residency.offload}"
    parts = {name: round(value, 3) for name, value in drawn.provenance.seconds.items()}
    return {"t2v_exact_s": entry(seconds, how, passes=passes, parts=parts, peak_gb=_rounded(peak_gigabytes()))}


def _drawer(size: str, kind: str, tiny: bool, options: Sequence[str]) -> tuple[Pipeline, list[Request]]:
    if not tiny:
        model, requests = trial.asked([size, "--cond_type", kind, *options], "measure_performance")
        return trial.drawn(model, published=True), requests
    mesh, bundle = make_mesh(MeshShape()), random_weights.bundle_of(models_of(tiny))
    residency = random_weights.residency(bundle, mesh, jnp.bfloat16, offload=False)
    request = Request("-", cond_type=kind, refs=("-",) if kind != "t2v" else (), **SMALL)
    return Pipeline.over(residency, mesh, "bf16", "auto", trial.RANDOM, progress=False), [request]


def _texts(pipeline: Pipeline) -> Texts:
    """Token ids in place of a prompt and a negative one: random weights have no tokenizers."""
    start, texts = time.perf_counter(), []
    for token in (7, 8):
        states = []
        for name in ("t5", "clip"):
            ids_bl = np.full((1, pipeline.bundle.component(name).max_length), token, np.int32)
            with pipeline.residency.on_device(name) as encoder:
                states.append(jax.block_until_ready(encode_ids(encoder, ids_bl)))
        texts.append(Text(states[0], states[1][1]))
    return Texts(*texts, time.perf_counter() - start)


def counts(size: str, runs: int, *, tiny: bool) -> Figures:
    """Operations and bytes of the stages, by shapes alone."""
    del runs
    models, grid = models_of(tiny), grid_of(size, tiny=tiny)
    config, vae_config = models["mmdit"][1], models["vae"][1]
    components = random_weights.bundle_of(models).components
    model, vae, t5, clip = (abstract_model(components[name], jnp.bfloat16) for name in ("mmdit", "vae", "t5", "clip"))
    plain = functools.partial(jax.nn.dot_product_attention, implementation="xla")
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    qkv = [shape((1, grid.tokens + TEXT_TOKENS, config.num_heads, config.head_dim))] * 3
    angles = shape((1, grid.tokens, config.head_dim // 2), dtype=jnp.float32)
    inputs = (
        shape((1, grid.tokens, config.in_channels)),
        shape((1, TEXT_TOKENS, config.context_in_dim)),
        shape((1, config.vec_in_dim)),
        shape((1,)),
        Rope(angles, angles),
        shape((1, grid.tokens, config.cond_channels)),
    )
    z_bthwc = shape(grid.noise_shape(vae_config.latent_channels))
    ids = [jax.ShapeDtypeStruct((1, components[name].max_length), jnp.int32) for name in ("t5", "clip")]
    image_bthwc = shape((1, 1, 8 * grid.h, 8 * grid.w, 3), dtype=jnp.float32)
    work = {
        "text": roofline.work_of(lambda t5, clip, one, other: (t5(one), clip(other)), t5, clip, *ids),
        "reference": roofline.work_of(lambda vae, image_bthwc: vae.encode(image_bthwc), vae, image_bthwc),
        "attention": roofline.work_of(plain, *qkv),
        "forward": roofline.work_of(lambda model, *inputs: model(*inputs[:5], plain, inputs[5]), model, *inputs),
        "decode": roofline.work_of(lambda vae, z_bthwc: vae.decode(z_bthwc), vae, z_bthwc),
    }
    return {name: dataclasses.asdict(each) for name, each in work.items()}


def _rounded(value: float | None, digits: int = 2) -> float | None:
    return None if value is None else round(value, digits)


STAGES: dict[str, Callable[..., Figures]] = {
    "attention": attention,
    "forward": forward,
    "forward_fp8": forward_fp8,
    "decode": decode,
    "decode_check": decode_check,
    "t2v": video,
    "i2v": functools.partial(video, kind="i2v_head"),
    **{name: functools.partial(limited, stage=name) for name in ("t2v_24gb", "t2v_40gb")},
    "whole": whole,
    "counts": counts,
    "ceilings": performance_machine.ceilings,
    "load": performance_machine.load,
    "start": performance_start.start,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=STAGES)
    parser.add_argument("size", choices=SIZES)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--options", type=shlex.split, default=[], help="of `osjax generate`, for t2v, i2v, start, whole"
    )
    parser.add_argument("--tiny", action="store_true", help="tiny weights and sizes, to rehearse")
    args = parser.parse_args()
    stage = STAGES[args.stage]
    if args.options:
        stage = functools.partial(stage, options=args.options)
    figures = stage(args.size, args.runs, tiny=args.tiny)
    versions = {"jax": jax.__version__, "python": platform.python_version()}
    found = {"device": jax.devices()[0].device_kind, "versions": versions, "figures": figures}
    args.out.write_text(json.dumps(found))


if __name__ == "__main__":
    main()
