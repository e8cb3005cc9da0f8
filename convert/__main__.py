"""`python -m convert SOURCE DESTINATION`: PyTorch checkpoints to an osjax bundle, a LoRA to an osjax LoRA."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from convert.layout import KINDS, NEEDED, PLACES, find_checkpoints
from osjax.errors import OsjaxError

if TYPE_CHECKING:
    from convert.stream import Job

PRECISIONS = ("fp8", "int8")  # those of `osjax.models.quantized`, which imports JAX
DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the converter's arguments; imports nothing heavy."""
    parser.add_argument(
        "source", type=Path, help="upstream's ckpts folder, a model's folder, one file, or a LoRA of peft"
    )
    parser.add_argument("destination", type=Path, help="folder of the bundle or LoRA, to be made")
    parser.add_argument(
        "--as",
        dest="kind",
        choices=[kind.name for kind in KINDS],
        help="convert only this kind (default: all that are found)",
    )
    parser.add_argument(
        "--model",
        choices=PLACES,
        default="open_sora_v2",
        help="which model of upstream's ckpts folder (default: %(default)s)",
    )
    parser.add_argument(
        "--config", type=Path, help="JSON of the checkpoint's options (default: beside it, else inferred)"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="of the bundle's weights (default: as in the checkpoint)")
    parser.add_argument(
        "--quantize",
        choices=PRECISIONS,
        help="store the projections in the transformer's blocks in 8 bits, which is APPROXIMATE",
    )
    parser.add_argument("--dry-run", action="store_true", help="print what would be converted, and write nothing")


def run(args: argparse.Namespace) -> int:
    """Does what the parsed arguments ask for and returns the exit status.

    Raises OsjaxError for what the user can mend; with --dry-run it prints that of checkpoints and returns 2.
    """
    import ml_dtypes  # noqa: F401 - makes numpy know bfloat16 by name

    from convert.peft import find_adapter
    from convert.stream import prepare, write_bundle

    adapter = find_adapter(args.source)
    if adapter:
        return run_lora(adapter, args)
    found = find_checkpoints(args.source, args.kind, args.model)
    if args.config and len(found) > 1:
        raise OsjaxError("--config is for one checkpoint: choose which with --as")
    options = args.config, DTYPES.get(args.dtype), args.quantize or "full"
    if not args.dry_run:
        jobs = [prepare(each, *options) for each in found]
        if args.quantize and not any(job.quantized for job in jobs):
            raise OsjaxError(f"--quantize is for transformers, and {args.source} has none here: leave it out")
        write_bundle(jobs, args.destination)
        print(*(describe(job) for job in jobs), f"bundle written to {args.destination}", sep="\n")
        absent = [component for component in NEEDED if component not in [job.kind.component for job in jobs]]
        if absent:
            print(f"it holds no {', '.join(absent)}: generating needs all of {', '.join(NEEDED)}")
        return 0
    status = 0
    for each in found:
        try:
            job = prepare(each, *options)
            print(describe(job), f"  {job.config}", sep="\n")
        except OsjaxError as error:
            print(f"{each.file}: {error}")
            status = 2
    return status


def run_lora(adapter: Path, args: argparse.Namespace) -> int:
    """The same for a LoRA file."""
    from convert import lora

    if args.kind or args.dtype or args.quantize:
        raise OsjaxError(f"{adapter} is a LoRA, which is kept in float32: leave out --as, --dtype and --quantize")
    job = lora.prepare(adapter, args.config)
    print(job.describe())
    if not args.dry_run:
        lora.write(job, args.destination)
        print(f"LoRA written to {args.destination}: use it with --lora {args.destination}")
    return 0


def describe(job: Job) -> str:
    """One line about a component: its source, tensors, size, and where its options come from."""
    return (
        f"{job.kind.component}: {job.file}, {len(job.source.shapes)} tensors ({len(job.plan.unused)} not needed), "
        f"{job.parameters:,} parameters, {job.nbytes:,} bytes in {job.dtype.name}"
        f"{f' and {job.precision}' if job.quantized else ''}, options from {job.options_from}"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; prints an OsjaxError as one line and returns 2."""
    parser = argparse.ArgumentParser("python -m convert", description="Convert PyTorch checkpoints to an osjax bundle.")
    add_arguments(parser)
    args = parser.parse_args(argv)
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing is computed: leave accelerators to others
    try:
        return run(args)
    except OsjaxError as error:
        print(f"convert: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
