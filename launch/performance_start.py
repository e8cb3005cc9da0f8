"""The stage `start` of `launch/performance_stages.py`: `osjax generate` on a bundle that lies on disk, watched from
outside. It is run twice with a cache of compiled programs of its own, which is empty the first time.
"""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from launch.performance_sizes import SMALL, Figures, entry

STEPS = 3  # what is watched at least: the third step of a video has as many passes as the first, and compiles nothing
TO_THE_END = ("256px",)  # at 768px a video takes eleven minutes
COMMAND = "import sys; from osjax.cli.main import main; sys.exit(main())"
# What tqdm shows of steps, and of a model that has been read: its size, and bytes for each second of all of that time.
STEP = re.compile(r"denoise: [^\r\n]*\| (\d+)/\d+ \[")
LOADED = re.compile(r"load (\w+): 100%[^\r\n]*\| ([\d.]+)([kMG])/[^\r\n]*, +([\d.]+)([kMG])B/s\]")
UNITS = {"k": 1e3, "M": 1e6, "G": 1e9}


@dataclasses.dataclass(frozen=True)
class Watched:
    """Seconds from the start of a command. steps: at which the first ones were done; loading: how many of them it read
    models from disk, those that took a while; whole: until it ended, if that was waited for."""

    steps: tuple[float, ...]
    loading: float
    whole: float | None

    @property
    def first_step(self) -> float:
        """Until the first step was begun, as far as that can be seen: its end, less what the third one took."""
        return self.steps[0] - (self.steps[2] - self.steps[1])


def start(size: str, runs: int, *, tiny: bool, options: Sequence[str] = ()) -> Figures:
    """How long a command takes until its first step, beyond reading the weights: with nothing compiled, then again.

    Without `--ckpt_path` among the options a bundle is written first, 34 GB.
    """
    del runs
    words, given = [*options, "--prompt", "raining, sea"], any(each.startswith("--ckpt") for each in options)
    with tempfile.TemporaryDirectory() as folder:
        if tiny:
            words += [f"--{key}={value}" for key, value in SMALL.items() if value is not None]
        elif given:
            words = [size, *words]
        else:
            bundle = f"{folder}/bundle"
            subprocess.run([sys.executable, "-m", "launch.random_bundle", bundle], check=True)
            words = [size, *words, "--ckpt_path", bundle]
        how = {"cache": Path(folder) / "compiled", "to_the_end": tiny or size in TO_THE_END}
        first, again = (watch([*words, "--save-dir", f"{folder}/{turn}"], **how) for turn in ("first", "again"))
    return figures(first, again)


def figures(first: Watched, again: Watched) -> Figures:
    how = "osjax generate until its first step is begun, less {:.3g} s of reading weights; {} before"
    found = {
        f"{name}_start_s": entry(each.first_step - each.loading, how.format(each.loading, compiled))
        for name, each, compiled in [("first", first, "nothing compiled"), ("second", again, "all compiled")]
    }
    if again.whole is not None:
        whole = "osjax generate from its start to its end, one video; all compiled before"
        found["command_s"] = entry(again.whole, whole, loading_s=round(again.loading, 2))
    return found


def watch(words: Sequence[str], cache: Path, *, to_the_end: bool) -> Watched:
    """Runs `osjax generate` with these words. Raises RuntimeError with what it told last if it ends early."""
    environment = os.environ | {"XDG_CACHE_HOME": str(cache)}
    environment.pop("JAX_COMPILATION_CACHE_DIR", None)  # so that the cache is what it is for users
    started, told, steps = time.monotonic(), "", []
    process = _generate(words, environment)
    try:
        while chunk := os.read(process.stderr.fileno(), 1 << 16):
            told += chunk.decode(errors="replace")
            done = max((int(count) for count in STEP.findall(told)), default=0)
            steps += [time.monotonic() - started] * (min(done, STEPS) - len(steps))
            if len(steps) == STEPS and not to_the_end:
                return Watched(tuple(steps), loading(told), None)
        if process.wait() or len(steps) < STEPS:
            raise RuntimeError(f"osjax generate ended early: {told.strip().splitlines()[-1:]}")
        return Watched(tuple(steps), loading(told), time.monotonic() - started)
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def _generate(words: Sequence[str], environment: Mapping[str, str]) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", COMMAND, "generate", *words]
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def loading(told: str) -> float:
    """Seconds that models were read, by what was told of each when all of it had come."""
    by_model = {
        name: float(size) * UNITS[a] / (float(rate) * UNITS[b]) for name, size, a, rate, b in LOADED.findall(told)
    }
    return sum(by_model.values())
