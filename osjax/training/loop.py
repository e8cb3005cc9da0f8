"""The run: batches → steps → metrics, checkpoints, samples, and a bundle at the end.

A run that is killed and started again goes on from its newest checkpoint and ends with the same weights, bit for bit,
as one that was left alone: the state holds the step, step and seed decide every random draw, and where the stream
stands is saved with it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import jax
from jax.sharding import Mesh

from osjax.errors import OsjaxError
from osjax.parallel.mesh import TrainingMeshShape, make_mesh, parse_mesh
from osjax.room import explaining_memory
from osjax.training.metrics import Metrics
from osjax.training.options import TrainConfig
from osjax.training.snapshots import Snapshots
from osjax.training.stages import Stage, open_stage
from osjax.training.state import TrainState, Weights, abstract_start, make_step, start

_LESS_MEMORY = (
    "take a smaller --run.batch_size, shorter or smaller clips, --run.remat blocks, an adapter (--lora.rank), or more "
    "devices with --run.mesh fsdp=N"
)


@dataclasses.dataclass(frozen=True)
class Ended:
    """How a run ended: optimizer steps done, the folder of the exported bundle or adapter, None if it was stopped."""

    steps: int
    exported: Path | None


@explaining_memory(lambda: _LESS_MEMORY)
def run(config: TrainConfig, folder: Path, *, force: bool = False) -> Ended:
    """Trains to `run.steps`, from the newest checkpoint in `folder` if there is one; SIGTERM and SIGINT save and stop.

    Writes checkpoints, metrics, samples and at the end `bundle` or `lora` into the folder. Raises OsjaxError for a
    config that does not go with the models, the data or the mesh, or differs from the checkpoint's (`force` goes on
    anyway); for a loss that is not finite, naming the step, the last good checkpoint being kept; for a full disk.
    """
    mesh = make_mesh(parse_mesh(config.run.mesh, TrainingMeshShape))
    snapshots = Snapshots(folder, config.run.keep, dataclasses.asdict(config), force)
    with contextlib.closing(snapshots):
        stage, trained, frozen = open_stage(config, mesh, folder)
        with contextlib.closing(stage.stream), _stop_signals() as stop:
            state = _resume_or_start(config, snapshots, stage, trained, mesh)
            del trained
            state, batch = _steps(config, folder, stage, state, frozen, snapshots, stop)
            if int(state.step) < config.run.steps:
                return Ended(int(state.step), None)
            if batch is None:  # nothing was left to do but this
                batch = stage.prepare(frozen, next(stage.stream))
            return Ended(int(state.step), stage.export(folder, state.best, frozen, batch))


def _resume_or_start(
    config: TrainConfig, snapshots: Snapshots, stage: Stage, trained: Weights, mesh: Mesh
) -> TrainState:
    target = abstract_start(trained, config.optim, config.run.steps, mesh)
    latest = snapshots.latest()
    if latest is not None:
        state, stream = snapshots.restore(latest, target)
        stage.stream.set_state(stream)
        return state
    shardings = jax.tree.map(lambda leaf: leaf.sharding, target)
    begin = jax.jit(lambda weights: start(weights, config.optim, config.run.steps), out_shardings=shardings)
    return begin(trained)


def _steps(
    config: TrainConfig,
    folder: Path,
    stage: Stage,
    state: TrainState,
    frozen: Weights,
    snapshots: Snapshots,
    stop: list[int],
) -> tuple[TrainState, Any]:
    """(state at the end or where a signal stopped it, newest batch)."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    step = make_step(stage.loss, config.optim, config.run.steps, jax.random.key(config.run.seed), shardings)
    done, pending, batch, saved = int(state.step), None, None, int(state.step)
    with contextlib.closing(Metrics(folder, config.run.steps, done, config.run.log_every)) as metrics:
        report = _Report(metrics)
        while done < config.run.steps and not stop:
            batches = [stage.prepare(frozen, next(stage.stream)) for _ in range(config.optim.accumulate)]
            batch = batches[-1]
            state, values = step(state, frozen, batches)
            done += 1
            # The numbers of the step before are read while this one runs, so that the device never waits for the host.
            report(pending)
            pending = (done, values)
            if done % config.run.save_every == 0 or done == config.run.steps:
                report(pending)
                pending = None
                snapshots.save(done, state, stage.stream.get_state())
                saved = done
            if config.run.sample_every and done % config.run.sample_every == 0:
                _sample(stage, state, frozen, batch, metrics, done)
        report(pending)
        if done > saved:
            snapshots.save(done, state, stage.stream.get_state())
        snapshots.wait()
    return state, batch


class _Report:
    """Checks each step's numbers, adds the time it took and hands them to the metrics."""

    def __init__(self, metrics: Metrics):
        self._metrics = metrics
        self._since = time.perf_counter()

    def __call__(self, pending: tuple[int, dict[str, jax.Array]] | None) -> None:
        """Raises OsjaxError if the loss or the gradient is not finite."""
        if pending is None:
            return
        step, values = pending
        numbers = {name: float(value) for name, value in jax.device_get(values).items()}  # one transfer for all
        bad = [name for name in ("loss", "grad_norm") if not math.isfinite(numbers[name])]
        if bad:
            raise OsjaxError(
                f"{' and '.join(bad)} of step {step} not finite: nothing was saved since the last checkpoint; "
                "lower optim.lr, or use --run.dtype fp32"
            )
        now = time.perf_counter()
        numbers["seconds"], self._since = now - self._since, now
        self._metrics.log(step, numbers)


def _sample(stage: Stage, state: TrainState, frozen: Weights, batch: Any, metrics: Metrics, step: int) -> None:
    for name, frames in stage.samples(state.best, frozen, batch):
        metrics.video(step, name, frames)


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """A list that a SIGTERM or SIGINT within the block is put into, so that the step at work ends and is saved."""
    seen: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        seen.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
