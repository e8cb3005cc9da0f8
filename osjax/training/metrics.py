"""What a run tells while it goes: a progress bar, lines, `metrics.jsonl`, TensorBoard events and sample videos.

`metrics.jsonl` has one JSON object a line, `{"step": 12, "loss": 0.41, ...}`, each step once however often the run was
stopped: a resumed run takes out what lies past the checkpoint that it goes on from. TensorBoard's files only grow:
there such steps appear twice, with equal values, as a resumed run repeats them exactly.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import jax
import numpy as np
from tqdm import tqdm

from osjax.errors import OsjaxError
from osjax.files import make_folder, replacing
from osjax.media.write import write_mp4, write_png

if TYPE_CHECKING:
    from tensorboard.summary import Writer


class Metrics:
    """Tells of a run in its folder. Of several processes only the first does; the others' calls do nothing."""

    def __init__(self, folder: Path, total_steps: int, start: int = 0, log_every: int = 0):
        """start: steps done already; log_every: steps between lines on stdout, 0 for none. Raises OsjaxError."""
        self._tells = jax.process_index() == 0
        if not self._tells:
            return
        self._folder = make_folder(folder)
        self._total, self._log_every = total_steps, log_every
        self._said = time.monotonic(), start  # when the newest line was written, and of which step
        with _writing(self._folder):
            self._lines = _reopen(self._folder / "metrics.jsonl", start)
            self._events = _open_events(self._folder / "tensorboard")
        # None: on a terminal only; in a file the lines do better.
        self._bar = tqdm(total=total_steps, initial=start, desc="train", unit="step", disable=None)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Tells of optimizer step `step`, the first being 1. values: scalars by name; a JAX array is waited for.

        What is not finite is null in the file, as JSON has no word for it. Raises OsjaxError if the disk refuses.
        """
        if not self._tells:
            return
        numbers = {name: float(value) for name, value in values.items()}
        with _writing(self._folder):
            finite = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
            self._lines.write(json.dumps({"step": step, **finite}) + "\n")
            self._lines.flush()
            if self._events:
                for name, value in numbers.items():
                    self._events.add_scalar(name, value, step)
        text = " ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        self._bar.set_postfix_str(text, refresh=False)
        self._bar.update(step - self._bar.n)
        if self._log_every and step % self._log_every == 0:
            self._bar.write(f"step {step}/{self._total} {text} left {self._left(step)}", file=sys.stdout)
            sys.stdout.flush()

    def video(self, step: int, name: str, frames: np.ndarray, fps: float = 24) -> None:
        """Writes uint8 frames [T, H, W, 3] to `samples/step_<step>_<name>.mp4`, a single one to `.png`."""
        if not self._tells:
            return
        stem = f"step_{step:07d}_{name}"
        if len(frames) == 1:
            write_png(self._folder / "samples" / f"{stem}.png", frames[0])
        else:
            write_mp4(self._folder / "samples" / f"{stem}.mp4", frames, fps)

    def close(self) -> None:
        """Ends the bar and closes the files. Raises OsjaxError if the disk refuses."""
        if not self._tells:
            return
        self._bar.close()
        with _writing(self._folder):
            self._lines.close()
            if self._events:
                self._events.close()

    def _left(self, step: int) -> str:
        """The time that the rest will take at the pace since the line before, as 1:02:03.

        Not since the start, which compiled: that would be taken for the pace of the run for a long time.
        """
        (before, said), self._said = self._said, (time.monotonic(), step)
        pace = (self._said[0] - before) / (step - said)
        return tqdm.format_interval(pace * (self._total - step))


def _reopen(path: Path, start: int) -> TextIO:
    """The file, ready for the lines of the steps after `start`; later ones of an earlier try are taken out."""
    if path.exists():
        kept = [line for line in path.read_text().splitlines() if _step(line) <= start]
        with replacing(path) as temporary:
            temporary.write_text("".join(f"{line}\n" for line in kept))
    return path.open("a")


def _step(line: str) -> float:
    """The step that a line tells of; past all steps for a line that a kill cut off."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return math.inf


def _open_events(folder: Path) -> Writer | None:
    """A writer of TensorBoard events, or None, said once, where the package is missing: nobody needs it to train."""
    try:
        from tensorboard.summary import Writer
    except ImportError:
        print("osjax: no TensorBoard events: for them, pip install 'osjax[train]'", file=sys.stderr, flush=True)
        return None
    return Writer(str(folder))


@contextlib.contextmanager
def _writing(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise OsjaxError(f"cannot write metrics in {folder} ({error}): check space and rights") from error
