"""How long each part of a video takes, and what a whole one adds up to.

Parts are what the pipeline itself runs: text encoding, encoding references, a step of each number of guidance branches
that the plan has, decoding. A video is the sum of their medians, each as often as it is needed: nobody waits for fifty
steps to learn what one takes, and the figure says that it is multiplied.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from osjax import room
from osjax.models.rope import rope_table
from osjax.models.streamed import StreamedMMDiT
from osjax.pipeline import Pipeline, encode_ids
from osjax.preflight import GB
from osjax.request import Request
from osjax.roles import sampling_options
from osjax.sampling import guidance, schedule
from osjax.sampling.caching import SPEEDS
from osjax.sampling.denoise import denoise
from osjax.sampling.geometry import image_ids, unpack
from osjax.sampling.step import Branches
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
    """A model that comes to the devices for the first time: read from disk, or drawn if its weights are random."""

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


class Work(NamedTuple):
    """Something that the pipeline does for a video. program: what it compiles, perhaps as another work does, or '' for
    nothing; times: how often it is done; run: does it once, to its end; held: what is there all the while."""

    name: str
    program: str
    times: int
    run: Callable[[], Any]
    held: Callable[[], contextlib.AbstractContextManager[Any]] = contextlib.nullcontext


def measure(pipeline: Pipeline, requests: Sequence[Request], runs: int, *, progress: bool = True) -> Measured:
    """Measures what drawing these together takes; they differ in prompts, references and seeds only.

    Prompts and references are not read: random numbers of their sizes stand for them, and every prompt differs from its
    negative one. Raises OsjaxError as `Pipeline.shape` does, and if a device's memory is full.
    """
    parts = []
    with room.explaining_memory(lambda: pipeline.shortage(requests)):
        plan, work = _work(pipeline, requests)
        loads = [_load(pipeline, requests, name) for name in pipeline.roles.components]
        for each in _shown(work, "bench", progress):
            with each.held():
                parts.append(Part(each.name, *timed(each.run, runs), runs, each.times, peak_gigabytes()))
    return Measured(tuple(loads), tuple(parts), guidance.forward_passes(plan), len(requests))


def compile_all(pipeline: Pipeline, requests: Sequence[Request], *, progress: bool = True) -> dict[str, float]:
    """Does everything once, so that what it compiles comes into JAX's persistent cache: program → seconds.

    Weights do not matter. Raises OsjaxError as `measure`.
    """
    seconds = {}
    with room.explaining_memory(lambda: pipeline.shortage(requests)):
        _, work = _work(pipeline, requests)
        by_program = {each.program: each for each in work if each.program}
        for each in _shown(list(by_program.values()), "compile", progress):
            start = time.perf_counter()
            each.run()
            seconds[each.program] = time.perf_counter() - start
    return seconds


def timed(run: Callable[[], Any], runs: int) -> tuple[float, float]:
    """(median seconds of `runs` calls, what one before them took beyond it); each is waited for."""
    laps = []
    for _ in range(runs + 1):
        start = time.perf_counter()
        jax.block_until_ready(run())
        laps.append(time.perf_counter() - start)
    median = statistics.median(laps[1:])
    return median, max(0.0, laps[0] - median)


def peak_gigabytes() -> float | None:
    """The most that the process ever had on one of its devices; None where these do not tell, as CPUs do not."""
    found = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in jax.local_devices()]
    return None if None in found else max(found) / GB


def _work(pipeline: Pipeline, requests: Sequence[Request]) -> tuple[Sequence[guidance.GuidedStep], list[Work]]:
    """(how one video is guided, all that these take, in its order)."""
    one, shape = requests[0], pipeline.shape(requests[0])
    given = shape.reference_frames if shape.kind.references else 0
    plan = _plan(pipeline, one, shape, same_condition=not given)
    encoders = functools.partial(_encoders, pipeline)
    work = [Work("text encoders come", "", 1, lambda: _bring(encoders()))] if pipeline.residency.offload else []
    # prompts and negative prompts
    work.append(Work("text", "text", 2, lambda: _encode_text(pipeline, len(requests)), encoders))
    if given:
        clips = [np.asarray(_random((given, *shape.size, 3)))]
        times = shape.kind.references * len(requests)
        work.append(Work("reference", "reference", times, lambda: pipeline.encode_references(one, clips)))
    held = functools.partial(pipeline.transformer, requests)
    step, x_bnc = _stepper(pipeline, requests, shape)
    if pipeline.residency.offload:
        work.append(Work("transformer comes", "", 1, lambda: _bring(held())))
    for branches, times in sorted(collections.Counter(len(each.branches) for each in plan).items()):
        kind = next(each for each in plan if len(each.branches) == branches)
        work.append(Work(f"step of {branches}", "step", times, functools.partial(step, kind), held))
    work.append(Work("decode", "decode", 1, lambda: pipeline.decode(unpack(x_bnc, shape.grid))))
    return plan, work


def _shown(work: Sequence[Work], what: str, progress: bool) -> Iterator[Work]:
    """One after the other, with a bar that names the one at hand."""
    bar = tqdm(total=len(work), desc=what, unit="part", disable=not progress)
    with bar:
        for each in work:
            bar.set_postfix_str(each.name)
            yield each
            bar.update()


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


def _load(pipeline: Pipeline, requests: Sequence[Request], name: str) -> Load:
    start, residency = time.perf_counter(), pipeline.residency
    held = pipeline.transformer(requests) if name == pipeline.roles.mmdit else residency.on_device(name)
    with held as model:
        weights = weights_of(model)
        seconds = time.perf_counter() - start
        return Load(name, sum(array.nbytes for array in jax.tree.leaves(weights)) / GB, seconds)


@contextlib.contextmanager
def _encoders(pipeline: Pipeline) -> Iterator[tuple[Any, Any]]:
    """Both text encoders, as `osjax.embedding.encode_all` has them there for all prompts."""
    with pipeline.residency.on_device("t5") as t5, pipeline.residency.on_device("clip") as clip:
        yield t5, clip


def weights_of(model: Any) -> Any:
    """All arrays of a model that is there, blocks that wait in host memory too."""
    return jax.block_until_ready(model.layers if isinstance(model, StreamedMMDiT) else model)


def _bring(held: contextlib.AbstractContextManager[Any]) -> None:
    """Has models there and lets them go again."""
    with held as model:
        weights_of(model)


def _encode_text(pipeline: Pipeline, count: int) -> list[Any]:
    """One set of prompts through both encoders, as token ids, since not every bundle has tokenizers."""
    states = []
    for name in ("t5", "clip"):
        ids_bl = np.full((count, pipeline.bundle.component(name).max_length), 7, np.int32)
        with pipeline.residency.on_device(name) as encoder:
            states.append(jax.block_until_ready(encode_ids(encoder, ids_bl)))
    return states


def _stepper(
    pipeline: Pipeline, requests: Sequence[Request], shape: Shape
) -> tuple[Callable[[guidance.GuidedStep], Any], jax.Array]:
    """(a function that takes one step in the middle of sampling; latents as the last step leaves them)."""
    residency, grid, count = pipeline.residency, shape.grid, len(requests)
    config, dtype = residency.config(pipeline.roles.mmdit), residency.dtype
    length = pipeline.bundle.component("t5").max_length
    cond_kbnc = _random((3, count, grid.tokens, config.cond_channels), dtype) if config.cond_embed else None
    text_kblc = _random((3, count, length, config.context_in_dim), dtype)
    branches = Branches(text_kblc, _random((3, count, config.vec_in_dim), dtype), cond_kbnc)
    rope = rope_table(image_ids(grid)[None], config.axes_dim, config.theta)
    x_bnc = _random((count, grid.tokens, config.in_channels))
    levels = schedule.timesteps(50, grid.tokens_per_frame, grid.t)[10:12]
    reuse = SPEEDS[requests[0].speed]

    def step(kind: guidance.GuidedStep) -> Any:
        with pipeline.transformer(requests) as mmdit:
            return denoise(mmdit, x_bnc, branches, rope, [kind], levels, pipeline.where, reuse=reuse)

    # No step at all: laid out over the mesh as after the last one, because decoding is compiled for that.
    after_bnc, _ = denoise(None, x_bnc, branches, rope, [], levels, pipeline.where)
    return step, after_bnc


def _random(shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> jax.Array:
    return jax.random.normal(jax.random.key(1), shape, dtype)
