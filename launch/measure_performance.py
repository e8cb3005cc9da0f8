"""All figures of docs/performance/results.json: what each stage of a video takes on this device, and should take.

    python launch/measure_performance.py                                # every stage at 256px and 768px
    python launch/measure_performance.py --sizes 256px --stages forward decode whole
    python launch/measure_performance.py --table                        # the figures as Markdown, beside their goals
    python launch/measure_performance.py --tiny --out /tmp/tiny.json    # a rehearsal on any device

Every stage is a process of its own (`launch/performance_stages.py`, `launch/torch_baseline.py`): its peak of memory is
its own, and one that fails or takes longer than `--limit` leaves the others' figures. Figures of stages that are not
run stay; each says by itself on what device, with what and when it was made, and whether it was measured or multiplied.
`whole` draws a video from beginning to end in place of summing its parts and is run only where it is named. `start`
writes a bundle of 34 GB into the temporary folder, unless --options name one with --ckpt_path.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT)] if str(ROOT) not in sys.path else []  # of a script it is `launch` that Python puts there

from launch.performance_table import table  # noqa: E402
from launch.roofline import Ceilings, Work, floor  # noqa: E402
from osjax.errors import OsjaxError  # noqa: E402
from osjax.files import make_folder, replacing  # noqa: E402
from osjax.request import EXACT  # noqa: E402
from osjax.sampling import guidance  # noqa: E402
from osjax.sampling.caching import SPEEDS  # noqa: E402

SIZES = ("256px", "768px")
STEPS = 50  # of a video
OUT = ROOT / "docs" / "performance" / "results.json"
# Stage → what it must fill in at each size.
STAGES: dict[str, tuple[str, ...]] = {
    "ceilings": (),
    "load": (),
    "counts": (),
    "attention": ("attention_tflops", "cudnn_tflops", "attention_fp8_tflops"),
    "forward": ("forward_s",),
    "forward_fp8": ("forward_fp8_s", "forward_fp8_products_s"),
    "decode": ("vae_decode_s", "vae_decode_peak_gb"),
    "decode_check": ("vae_decode_error",),
    "t2v": ("t2v_exact_s", "peak_gb"),
    "i2v": ("i2v_exact_s",),
    "t2v_24gb": ("t2v_24gb_s", "t2v_24gb_peak_gb"),
    "t2v_40gb": ("t2v_40gb_s", "t2v_40gb_peak_gb"),
    "torch": ("torch_forward_s",),
    "start": ("second_start_s", "command_s"),
    "whole": ("t2v_exact_s",),
}
WHOLE, CEILINGS, COUNTS, LOAD = "whole", "ceilings", "counts", "load"
ONCE = (CEILINGS, LOAD)  # of the machine, whatever the size of a video
TAKE_OPTIONS = ("t2v", "i2v", "start", WHOLE)
# Smaller cards are this device with less memory for XLA: of 24 and 40 GB what is left for it if given 92 %.
LIMITS = {f"t2v_{card}gb": 0.92 * card for card in (24, 40)}
# What a video takes at a speed, and what a pass in full is the sum of: figure → sign. What step caching adds to it in 8
# bits is that in 16.
DERIVED = {f"t2v_{speed}_s": (speed, {"forward_kept_s": 1}) for speed in SPEEDS if speed != EXACT} | {
    f"t2v_fast_{bits}_s": ("fast", {f"forward_{bits}_s": 1, "forward_kept_s": 1, "forward_s": -1})
    for bits in ("fp8", "fp8_products")
}
# Stage of the roofline → the figure that tells its time.
TIMED = {"text": "text_s", "reference": "reference_s", "attention": "attention_tflops", "forward": "forward_s"}
TIMED |= {"decode": "vae_decode_s"}
KEYS = tuple(dict.fromkeys((*(key for keys in STAGES.values() for key in keys), *DERIVED)))


@dataclasses.dataclass(frozen=True)
class Child:
    """A stage as a process. options: of `osjax generate`, for those that draw videos."""

    stage: str
    size: str
    runs: int
    tiny: bool
    options: str = ""

    @property
    def words(self) -> list[str]:
        module = ["launch.torch_baseline"] if self.stage == "torch" else ["launch.performance_stages", self.stage]
        told = [f"--options={self.options}"] if self.options and self.stage in TAKE_OPTIONS else []
        return ["-m", *module, self.size, "--runs", str(self.runs), *told, *(["--tiny"] if self.tiny else [])]

    @property
    def name(self) -> str:
        return self.stage if self.stage in ONCE else f"{self.stage} {self.size}"


@dataclasses.dataclass(frozen=True)
class Ended:
    """found: what the child wrote; failed: one line that says why it did not."""

    found: Mapping[str, Any] | None = None
    failed: str = ""


def run(child: Child, limit: float, folder: Path, bar: tqdm) -> Ended:
    """Runs it to its end or the limit, in seconds; what it prints is kept in the folder."""
    if child.stage == "torch" and importlib.util.find_spec("torch") is None:
        return Ended({"figures": {"torch_forward_s": _absent("left out: PyTorch is not there")}})
    out, log = (folder / f"{child.stage}-{child.size}.{ending}" for ending in ("json", "log"))
    environment = os.environ | ({"JAX_PLATFORMS": "cpu"} if child.stage == COUNTS else {}) | limit_memory(child)
    with log.open("w") as told:
        words = [sys.executable, *child.words, "--out", str(out)]
        where = {"cwd": ROOT, "env": environment, "stdout": told, "stderr": subprocess.STDOUT}
        process = subprocess.Popen(words, **where, start_new_session=True)
        try:
            ends = time.monotonic() + limit
            while process.poll() is None and time.monotonic() < ends:
                time.sleep(0.2)
                if sys.stderr.isatty():  # the time that it shows
                    bar.refresh()
            late = process.poll() is None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # the commands too that a stage has started
            process.wait()
    if late:
        return Ended(failed=f"ran past {limit:g} s")
    if process.returncode or not out.exists():
        last = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()][-1:]
        return Ended(failed=" ".join(last)[:300] or f"exit status {process.returncode}")
    return Ended(json.loads(out.read_text()))


def limit_memory(child: Child) -> dict[str, str]:
    """Variables that leave a child as much memory as its stage is about; none where no GPU tells how much it has."""
    if child.stage not in LIMITS or shutil.which("nvidia-smi") is None:
        return {}
    words = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    total = int(subprocess.run(words, capture_output=True, text=True, check=True).stdout.split()[0]) * 2**20
    return {"XLA_PYTHON_CLIENT_MEM_FRACTION": f"{LIMITS[child.stage] * 1e9 / total:.4f}"}


def merged(results: Mapping[str, Any], child: Child, ended: Ended, date: str) -> dict[str, Any]:
    """The results with what the child found, each figure with where it comes from.

    A failure is told only where there is no figure yet.
    """
    place = CEILINGS if child.stage in ONCE else child.size
    known = dict(results.get(place, {}))
    if ended.found is None:
        gaps = [key for key in STAGES[child.stage] if known.get(key, _absent(""))["value"] is None]
        return {**results, place: known | {key: _absent(f"failed on {date}: {ended.failed}") for key in gaps}}
    found = ended.found
    if child.stage == COUNTS:
        return {**results, place: known | {COUNTS: found["figures"]}}
    source = {key: found[key] for key in ("device", "versions") if key in found}
    stamp = {**source, "date": date, "command": shlex.join(["python", *child.words])}
    figures = {key: figure | stamp for key, figure in found["figures"].items()}
    top = source if child.stage != "torch" else {}
    return {**results, **top, place: known | figures}


def completed(results: Mapping[str, Any]) -> dict[str, Any]:
    """With all that follows from the figures, and a word for each key that nothing was found for."""
    done = dict(results)
    for size in SIZES:
        figures = done.get(size, {})
        figures = figures | _speeds(figures)
        ordered = {key: figures.get(key, _absent("not run")) for key in KEYS}
        done[size] = ordered | figures | {"roofline": _roofline(figures, done.get(CEILINGS, {}))}
    head = ("device", "versions", "tiny", CEILINGS, *SIZES)
    return {key: done[key] for key in head if key in done}


def _absent(why: str) -> dict[str, Any]:
    return {"value": None, "measured": False, "how": why}


def _speeds(figures: Mapping[str, Any]) -> dict[str, Any]:
    """What a video takes at the approximate speeds, in 8 bits too, multiplied."""
    found = {}
    for key, (speed, signs) in DERIVED.items():
        needed = {name: figures.get(name) for name in (*signs, "forward_cut_s", "t2v_rest_s")}
        if why := _unfit(needed):
            found[key] = _absent(why)
            continue
        first, *_, cut, rest = needed.values()
        passes, full = rest["passes"], _passes_in_full(speed)
        one = sum(sign * needed[name]["value"] for name, sign in signs.items())
        value = full * one + (passes - full) * cut["value"] + rest["value"]
        terms = "".join(f" {'+' if sign > 0 else '-'} {name}" for name, sign in signs.items()).removeprefix(" + ")
        how = (
            f"multiplied: of {passes} passes {full} x {terms if len(signs) == 1 else f'({terms})'}, the others x "
            f"forward_cut_s, + t2v_rest_s; so many are in full by the schedule of {speed} (osjax/sampling/caching.py)"
        )
        stamp = {name: first[name] for name in ("device", "versions", "date")}
        found[key] = {"value": float(f"{value:.5g}"), "measured": False, "how": how, **stamp}
    return found


def _passes_in_full(speed: str) -> int:
    """Of a text to video, if nothing changes so suddenly that more are."""
    scales, kind = guidance.Guidance(), {"image_condition": False, "same_text": False, "same_condition": True}
    return SPEEDS[speed].passes_in_full(guidance.plan(scales, STEPS, 1, **kind))


def _unfit(figures: Mapping[str, Mapping[str, Any] | None]) -> str:
    """Why nothing can be computed of these together; empty if it can."""
    missing = [key for key, figure in figures.items() if figure is None or figure["value"] is None]
    if missing:
        return f"not computed: {', '.join(missing)} missing"
    devices = {figure["device"] for figure in figures.values()}
    return f"not computed: parts were measured on {' and '.join(sorted(devices))}" if len(devices) > 1 else ""


def _roofline(figures: Mapping[str, Any], ceilings: Mapping[str, Any]) -> dict[str, Any]:
    """Each counted stage: operations, bytes, and if the device's ceilings are known the floor, and how far above it."""
    found = {}
    for stage, counted in figures.get(COUNTS, {}).items():
        work, key = Work(**counted), TIMED[stage]
        found[stage] = dict(counted)
        needed = {name: ceilings.get(name) for name in ("matmul_tflops", "copy_gb_per_s")} | {key: figures.get(key)}
        if _unfit(needed):
            continue
        matmul, copy, value = (figure["value"] for figure in needed.values())
        seconds = work.operations / value / 1e12 if stage == "attention" else value
        least = floor(work, Ceilings(matmul * 1e12, copy * 1e9))
        found[stage] |= {
            "floor_s": least.seconds,
            "bound": least.bound,
            "seconds": seconds,
            "gap": seconds / least.seconds,
        }
    return found


def read(path: Path) -> dict[str, Any]:
    """Results so far. Raises OsjaxError for a file that holds none."""
    if not path.exists():
        return {}
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError, OSError) as error:
        raise OsjaxError(f"{path} holds no results ({error}): remove it, or give another --out") from error


def write(results: Mapping[str, Any], path: Path) -> None:
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(results, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def measure(children: Sequence[Child], path: Path, limit: float, logs: Path) -> int:
    """Runs them one after the other and writes the results after each; the exit status."""
    results, failures = read(path), []
    if results.get("tiny", children[0].tiny) != children[0].tiny:
        raise OsjaxError(f"{path} is of a rehearsal or this run is, and they do not mix: give another --out")
    results["tiny"] = children[0].tiny
    with tqdm(total=len(children), desc="measure", unit="stage") as bar:
        for child in children:
            bar.set_postfix_str(child.name)
            start = time.monotonic()
            ended = run(child, limit, logs, bar)
            results = completed(merged(results, child, ended, datetime.date.today().isoformat()))
            write(results, path)
            if ended.failed:
                failures.append(
                    f"error: {child.name}: {ended.failed}: other figures stand, what it printed is in {logs}"
                )
            bar.write(f"{child.name:20}{time.monotonic() - start:7.0f} s  {_told(ended)}")
            bar.update()
    print(path)
    for line in failures:
        print(line, file=sys.stderr)
    return 2 if failures else 0


def _told(ended: Ended) -> str:
    if ended.found is None:
        return f"failed: {ended.failed}"
    figures = {key: figure for key, figure in ended.found["figures"].items() if "value" in figure}
    return ", ".join(f"{key} {'–' if each['value'] is None else each['value']}" for key, each in figures.items())


def planned(stages: Sequence[str], sizes: Sequence[str], runs: int, *, tiny: bool, options: str = "") -> list[Child]:
    """The children of a run, in order: what is quick at all sizes first, drawing whole videos last."""
    order = [stage for stage in STAGES if stage in stages]
    return [
        Child(stage, size, runs, tiny, options) for stage in order for size in (sizes[:1] if stage in ONCE else sizes)
    ]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    usual = [stage for stage in STAGES if stage != WHOLE]
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=usual, help="by default all but `whole`")
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--runs", type=int, default=3, help="calls that are timed [3]")
    parser.add_argument("--limit", type=float, default=900, help="seconds of each stage at each size [900]")
    parser.add_argument(
        "--options", default="", help="of `osjax generate`, for t2v, i2v, start, whole: '--offload True'"
    )
    parser.add_argument("--whole", action="store_true", help="the stage `whole` too")
    parser.add_argument("--out", type=Path, help="the file that is updated [docs/performance/results.json]")
    parser.add_argument("--logs", type=Path, help="where what the stages print is kept [a temporary folder]")
    parser.add_argument("--tiny", action="store_true", help="tiny weights and sizes, to rehearse; needs --out")
    parser.add_argument("--table", action="store_true", help="measure nothing, print the figures that there are")
    args = parser.parse_args(argv)
    if args.runs < 1:
        parser.error("--runs counts the calls that are timed: give at least 1")
    if args.tiny and (args.out is None or args.options):
        parser.error("--tiny is a rehearsal: give an --out of its own, and no --options")
    path = args.out or OUT
    try:
        if args.table:
            print(table(read(path), SIZES))
            return 0
        stages = [*args.stages, *([WHOLE] if args.whole else [])]
        children = planned(stages, args.sizes, args.runs, tiny=args.tiny, options=args.options)
        logs = make_folder(args.logs) if args.logs else Path(tempfile.mkdtemp(prefix="osjax-performance-"))
        return measure(children, path, args.limit, logs)
    except OsjaxError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
