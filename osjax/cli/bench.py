"""`osjax bench`: how long each part of a video takes here, and what a whole one adds up to, as a table and as JSON.

It takes what `osjax generate` takes; prompts and references are stood for by random numbers.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from osjax.cli.overrides import parser_of
from osjax.cli.parser import Parser
from osjax.cli.trial import add_random_weights, asked, drawn, loaded
from osjax.errors import OsjaxError
from osjax.files import replacing
from osjax.request import EXACT, Request

if TYPE_CHECKING:
    from osjax.benchmark import Measured
    from osjax.pipeline import Pipeline


def main(argv: Sequence[str]) -> int:
    """Measure what the command line `argv` asks for and return the exit status. Raises OsjaxError."""
    own, rest = _parser().parse_known_args(argv)
    if own.runs < 1:
        raise OsjaxError("--runs counts the calls that are timed: give at least 1")
    model, requests = asked(rest, "bench")
    if requests[0].speed != EXACT:
        raise OsjaxError("bench measures exact steps: leave out --speed")

    from osjax import benchmark  # not above: imports JAX, and mistakes in the options should be told at once

    pipeline = drawn(model, published=True) if own.random_weights else loaded(model)
    measured = benchmark.measure(pipeline, requests, own.runs)
    print(table(measured, "draw" if own.random_weights else "load"))
    if own.out:
        with replacing(own.out) as temporary:
            temporary.write_text(json.dumps(report(measured, pipeline, requests[0]), indent=2) + "\n", encoding="utf-8")
        print(own.out)
    return 0


def _parser() -> Parser:
    parser = Parser(
        "osjax bench",
        usage="osjax bench [CONFIG] [--key value ...]",
        description="Measure each part of a video, and add up a whole one. Takes the options of `osjax generate` too.",
    )
    add_random_weights(parser, "draw the weights: of the published sizes, or those of --ckpt_path")
    parser.add_argument("--runs", type=parser_of(int), default=3, metavar="INT", help="calls that are timed [3]")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures as JSON")
    return parser


def table(measured: Measured, loading: str) -> str:
    """Loads and parts as lines of text, the sum last. loading: what loads are called."""
    lines = [f"{'':<20}{'each, s':>10}{'times':>7}{'in all, s':>11}{'first, s':>10}{'peak, GB':>10}"]
    for load in measured.loads:
        size = f"{load.gigabytes:.2f} GB"
        lines.append(f"{f'{loading} {load.name}':<20}{load.seconds:>10.3f}{size:>38}")
    for part in measured.parts:
        peak = "-" if part.peak is None else f"{part.peak:.2f}"
        lines.append(
            f"{part.name:<20}{part.seconds:>10.3f}{part.times:>7}{part.in_all:>11.3f}{part.first:>10.2f}{peak:>10}"
        )
    what = "a video" if measured.videos == 1 else f"{measured.videos} videos"
    lines.append(
        f"{what}: {measured.seconds:.2f} s, {measured.passes} forward passes; not run as a whole but summed from the "
        "medians of its parts, without loading and compiling"
    )
    return "\n".join(lines)


def report(measured: Measured, pipeline: Pipeline, request: Request) -> dict[str, Any]:
    """Everything, as JSON has it; `measured` is false of what was multiplied."""
    import jax

    mesh = pipeline.where.mesh
    asked = {name: value for name, value in dataclasses.asdict(request).items() if name not in ("prompt", "refs")}
    return {
        "osjax": importlib.metadata.version("osjax"),
        "jax": jax.__version__,
        "device": mesh.devices.flat[0].device_kind,
        "mesh": dict(mesh.shape),
        "dtype": pipeline.dtype,
        "precision": pipeline.residency.precision,
        "attention": pipeline.attention,
        "offload": pipeline.residency.offload,
        "weights": pipeline.label,
        "request": asked,
        "loads": [dataclasses.asdict(load) for load in measured.loads],
        "parts": [dataclasses.asdict(part) | {"measured": True} for part in measured.parts],
        "videos": measured.videos,
        "passes": measured.passes,
        "seconds": {"value": measured.seconds, "measured": False},
    }
