"""What `osjax bench` and `osjax compile` share: they do what a video takes, part by part, and draw none.

They take the options of `osjax generate`; prompts and references are stood for by random numbers.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from osjax.cli import generate, options
from osjax.cli.overrides import flatten, parser_of
from osjax.cli.parser import Parser
from osjax.errors import OsjaxError
from osjax.request import Request

if TYPE_CHECKING:
    from osjax.pipeline import Pipeline

RANDOM = "random weights"  # in place of a bundle's name
_NOT_TRIED = {
    "dataset.data_path": "a CSV",
    "use_t2i2v": "FLUX's pictures",
    "refine_prompt": "a language model",
    "sampling_option.extend": "its continuation",
}


def add_random_weights(parser: Parser, text: str) -> None:
    """The option of that name."""
    names = ("--random_weights", "--random-weights")
    parser.add_argument(*names, type=parser_of(bool), default=False, metavar="BOOL", help=text)


def asked(argv: Sequence[str], command: str) -> tuple[generate.Model, list[Request]]:
    """What draws, and the requests that are drawn together, by the options of `osjax generate`.

    Raises OsjaxError as these do, and for what is more than one draw.
    """
    read = options.read(argv)
    config = read.config
    given = flatten(config.to_dict())
    unfit = [name for key, name in _NOT_TRIED.items() if given[key]]
    if read.repeat or unfit:
        raise OsjaxError(f"{command} is for one video by itself, not {', '.join(unfit) or 'a file'}: leave that out")
    if config.prompt is None:
        config.prompt = "-"
    plan = generate.plan(config)

    from osjax.sampling.condition import condition_kind  # not above: imports JAX

    count = condition_kind(config.cond_type).references
    request = dataclasses.replace(plan.jobs[0].request, refs=("-",) * count)
    return plan.model, [request] * config.batch_size


def loaded(model: generate.Model) -> Pipeline:
    """A pipeline of the bundle's own weights, which draws without a bar. Raises OsjaxError as `Pipeline.load`."""
    from osjax.pipeline import Pipeline

    return Pipeline.load(**dataclasses.asdict(model), progress=False)


def drawn(model: generate.Model, *, published: bool) -> Pipeline:
    """A pipeline of random weights, of the bundle's sizes; without one, of the published or the embedded model's.

    Raises OsjaxError as `Pipeline.load`, and for LoRAs.
    """
    from osjax import random_weights
    from osjax.bundle import read_bundle
    from osjax.parallel.mesh import make_mesh, parse_mesh
    from osjax.pipeline import DTYPES, EMBEDDED, Pipeline
    from osjax.residency import chosen_precision

    if model.lora:
        raise OsjaxError("random weights have no LoRA: leave out --lora")
    if model.dtype not in DTYPES:
        raise OsjaxError(f"unknown dtype {model.dtype!r}: use one of {', '.join(DTYPES)}")
    if published and not model.path:
        bundle = random_weights.bundle_of(random_weights.PUBLISHED)
    else:
        bundle = read_bundle(model.path or EMBEDDED)
    mesh = make_mesh(parse_mesh(model.mesh))
    dtype, precision = DTYPES[model.dtype], chosen_precision(bundle, model.precision, mesh.devices.flat[0])
    residency = random_weights.residency(bundle, mesh, dtype, offload=model.offload, precision=precision)
    blocks = model.offload_blocks
    return Pipeline.over(residency, mesh, model.dtype, model.attention, RANDOM, progress=False, offload_blocks=blocks)
