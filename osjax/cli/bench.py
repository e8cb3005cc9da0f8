"""`osjax bench`: how long each part of a video takes here, and what a whole one adds up to, as a table and as JSON.

It takes what `osjax generate` takes; prompts and references are stood for by random numbers.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from osjax.cli import generate, options
from osjax.cli.overrides import flatten, parser_of
from osjax.cli.parser import Parser
from osjax.errors import OsjaxError
from osjax.files import replacing
from osjax.request import EXACT, Request
from osjax.sampling.condition import condition_kind

if TYPE_CHECKING:
    from osjax.benchmark import Measured
    from osjax.pipeline import Pipeline

_NOT_MEASURED = {"dataset.data_path": "a CSV", "use_t2i2v": "FLUX's pictures", "refine_prompt": "a language model"}


def main(argv: Sequence[str]) -> int:
    """Measure what the command line `argv` asks for and return the exit status. Raises OsjaxError."""
    own, rest = _parser().parse_known_args(argv)
    if own.runs < 1:
        raise OsjaxError("--runs counts the calls that are timed: give at least 1")
    read = options.read(rest)
    model, requests = _asked(read)

    from osjax import benchmark  # not above: imports JAX, and mistakes in the options should be told at once

    pipeline = _random(model, requests[0]) if own.random_weights else _loaded(model)
    measured = benchmark.measure(pipeline, requests, own.runs)
    print(table(measured))
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
    switch = parser_of(bool)
    parser.add_argument(
        "--random_weights",
        "--random-weights",
        type=switch,
        default=False,
        metavar="BOOL",
        help="draw the weights: of the published sizes, or those of --ckpt_path",
    )
    parser.add_argument("--runs", type=parser_of(int), default=3, metavar="INT", help="calls that are timed [3]")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the figures as JSON")
    return parser


def _asked(read: options.Options) -> tuple[generate.Model, list[Request]]:
    """What draws, and the requests that are drawn together. Raises OsjaxError for what is not measured."""
    config = read.config
    given = flatten(config.to_dict())
    unfit = [name for key, name in _NOT_MEASURED.items() if given[key]]
    if read.repeat or unfit:
        raise OsjaxError(f"bench measures one video by itself, not {', '.join(unfit) or 'a file'}: leave that out")
    if config.sampling_option.speed != EXACT or config.sampling_option.extend:
        raise OsjaxError("bench measures exact steps of one draw: leave out --speed and --extend")
    if config.prompt is None:
        config.prompt = "-"
    plan = generate.plan(config)
    count = condition_kind(config.cond_type).references
    request = dataclasses.replace(plan.jobs[0].request, refs=("-",) * count)
    return plan.model, [request] * config.batch_size


def _loaded(model: generate.Model) -> Pipeline:
    from osjax.pipeline import Pipeline

    return Pipeline.load(**dataclasses.asdict(model), progress=False)


def _random(model: generate.Model, request: Request) -> Pipeline:
    from osjax import random_weights
    from osjax.bundle import read_bundle
    from osjax.parallel.mesh import make_mesh, parse_mesh
    from osjax.pipeline import DTYPES, Pipeline
    from osjax.residency import model_config
    from osjax.sizes import shape_of

    if model.lora:
        raise OsjaxError("random weights have no LoRA: leave out --lora")
    if model.dtype not in DTYPES:
        raise OsjaxError(f"unknown dtype {model.dtype!r}: use one of {', '.join(DTYPES)}")
    bundle = read_bundle(model.path) if model.path else random_weights.bundle_of(random_weights.PUBLISHED)
    mesh = make_mesh(parse_mesh(model.mesh))
    vae, mmdit = (model_config(bundle.component(name)) for name in ("vae", "mmdit"))
    shape_of(request, vae, mmdit.patch_size)  # what cannot be drawn is told before the weights are
    print("osjax: drawing the weights", file=sys.stderr, flush=True)
    residency = random_weights.residency(bundle, mesh, DTYPES[model.dtype], offload=model.offload)
    return Pipeline.over(residency, mesh, model.dtype, model.attention, "random weights", progress=False)


def table(measured: Measured) -> str:
    """Loads and parts as lines of text, the sum last."""
    lines = [f"{'':<20}{'each, s':>10}{'times':>7}{'in all, s':>11}{'first, s':>10}{'peak, GB':>10}"]
    for load in measured.loads:
        size = f"{load.gigabytes:.2f} GB"
        lines.append(f"{'load ' + load.name:<20}{load.seconds:>10.3f}{size:>38}")
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
