"""How long each part of a video takes, and what a whole one adds up to.

Parts are what the pipeline itself runs: text encoding, encoding references, a step of each number of guidance branches
that the plan has, decoding. A video is the sum of their medians, each as often as it is needed: nobody waits for fifty
steps to learn what one takes, and the figure says that it is multiplied.
"""

from __future__ import annotations

import collections
import dataclasses
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from osjax import room
from osjax.models.rope import rope_table
from osjax.pipeline import Pipeline
from osjax.preflight import GB
from osjax.request import Request
from osjax.roles import sampling_options
from osjax.sampling import guidance, schedule
from osjax.sampling.denoise import Branches, denoise
from osjax.sampling.geometry import image_ids
from osjax.sizes import Shape


@dataclasses.dataclass(frozen=True)
class Part:
    """One part. seconds: median of `runs` calls after a first one; first: what that one took beyond it, mostly
    compiling; times: how often a video needs it; peak: GB that the process ever had on a device until then, None where
    devices do not tell."""

    name: str
    seconds: float
    first: float
    runs: int
    times: int
    peak: float | None

    @property
    def in_all(self) -> float:
        return self.seconds * self.times


@dataclasses.dataclass(frozen=True)
class Load:
    """A model that comes to the devices for the first time: from disk, or from host memory with random weights."""

    name: str
    gigabytes: float
    seconds: float


@dataclasses.dataclass(frozen=True)
class Measured:
    """loads and parts in their order; passes: of the transformer for one video; videos: drawn at once."""

    loads: tuple[Load, ...]
    parts: tuple[Part, ...]
    passes: int
    videos: int

    @property
    def seconds(self) -> float:
        """Of all parts that the videos need, multiplied, without loading and compiling."""
        return sum(part.in_all for part in self.parts)


def measure(pipeline: Pipeline, requests: Sequence[Request], runs: int, *, progress: bool = True) -> Measured:
    """Measures what drawing these together takes; they differ in prompts, references and seeds only.

    Prompts and references are not read: random numbers of their sizes stand for them, and every prompt differs from its
    negative one. Raises OsjaxError as `Pipeline.shape` does, and if a device's memory is full.
    """
    with room.explaining_memory(lambda: pipeline.shortage(requests)):
        return _measure(pipeline, requests, runs, progress)


def _measure(pipeline: Pipeline, requests: Sequence[Request], runs: int, progress: bool) -> Measured:
    shape = pipeline.shape(requests[0])
    given = shape.reference_frames if shape.kind.references else 0
    plan = _plan(pipeline, requests[0], shape, same_condition=not given)
    counts = collections.Counter(len(step.branches) for step in plan)
    loads: list[Load] = []
    parts: list[Part] = []
    bar = tqdm(total=2 + bool(given) + len(counts), desc="bench", unit="part", disable=not progress)

    def part(name: str, times: int, run: Callable[[], Any]) -> None:
        bar.set_postfix_str(name)
        parts.append(Part(name, *_timed(run, runs), runs, times, _peak()))
        bar.update()

    with bar:
        for name in pipeline.roles.components:
            loads.append(_load(pipeline, name))
        part("text", 2, lambda: _encode_text(pipeline, len(requests)))  # prompts and negative prompts
        if given:
            clips = [np.asarray(_random((given, *shape.size, 3)))]
            times = shape.kind.references * len(requests)
            part("reference", times, lambda: pipeline.encode_references(requests[0], clips))
        step = _stepper(pipeline, requests, shape)
        for branches, times in sorted(counts.items()):
            kind = next(each for each in plan if len(each.branches) == branches)
            part(f"step of {branches}", times, lambda kind=kind: step(kind))
        channels = pipeline.residency.config(pipeline.roles.mmdit).latent_channels
        z_bthwc = _random(shape.grid.noise_shape(channels, len(requests)))
        part("decode", 1, lambda: pipeline.decode(z_bthwc))
    return Measured(tuple(loads), tuple(parts), guidance.forward_passes(plan), len(requests))


def _plan(
    pipeline: Pipeline, request: Request, shape: Shape, *, same_condition: bool
) -> tuple[guidance.GuidedStep, ...]:
    options = sampling_options(request)
    return guidance.plan(
        options.branch_scales(pipeline.residency.config(pipeline.roles.mmdit).guidance_embed),
        options.steps,
        shape.grid.t,
        image_condition=shape.kind.is_image,
        same_text=False,
        same_condition=same_condition,
    )


def _timed(run: Callable[[], Any], runs: int) -> tuple[float, float]:
    """(median seconds, what the first call took beyond them)."""
    laps = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        jax.block_until_ready(run())
        laps.append(time.perf_counter() - start)
    median = statistics.median(laps[1:])
    return median, max(0.0, laps[0] - median)


def _load(pipeline: Pipeline, name: str) -> Load:
    start = time.perf_counter()
    with pipeline.residency.on_device(name) as module:
        jax.block_until_ready(module)
        seconds = time.perf_counter() - start
        return Load(name, sum(array.nbytes for array in jax.tree.leaves(module)) / GB, seconds)


def _encode_text(pipeline: Pipeline, count: int) -> list[Any]:
    """One set of prompts through both encoders, as token ids: bundles without tokenizers can be measured too."""
    states = []
    for name in ("t5", "clip"):
        ids_bl = np.full((count, pipeline.bundle.component(name).max_length), 7, np.int32)
        with pipeline.residency.on_device(name) as encoder:
            states.append(jax.block_until_ready(_encode(encoder, ids_bl)))
    return states


def _stepper(pipeline: Pipeline, requests: Sequence[Request], shape: Shape) -> Callable[[guidance.GuidedStep], Any]:
    """A function that takes one step in the middle of sampling."""
    residency, grid, count = pipeline.residency, shape.grid, len(requests)
    config, dtype = residency.config(pipeline.roles.mmdit), residency.dtype
    length = pipeline.bundle.component("t5").max_length
    cond_kbnc = _random((3, count, grid.tokens, config.cond_channels), dtype) if config.cond_embed else None
    text_kblc = _random((3, count, length, config.context_in_dim), dtype)
    branches = Branches(text_kblc, _random((3, count, config.vec_in_dim), dtype), cond_kbnc)
    rope = rope_table(image_ids(grid)[None], config.axes_dim, config.theta)
    x_bnc = _random((count, grid.tokens, config.in_channels))
    levels = schedule.timesteps(50, grid.tokens_per_frame, grid.t)[10:12]

    def step(kind: guidance.GuidedStep) -> Any:
        with residency.on_device(pipeline.roles.mmdit) as mmdit:
            return jax.block_until_ready(denoise(mmdit, x_bnc, branches, rope, [kind], levels, pipeline.where))

    return step


def _random(shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> jax.Array:
    return jax.random.normal(jax.random.key(1), shape, dtype)


def _peak() -> float | None:
    found = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    return None if None in found else max(found) / GB


_encode = jax.jit(lambda encoder, ids_bl: encoder(ids_bl))
