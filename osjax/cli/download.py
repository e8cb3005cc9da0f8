"""`osjax download`: published checkpoints into a folder that `osjax convert` takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from osjax.cli.parser import Parser
from osjax.errors import OsjaxError
from osjax.hub import download
from osjax.hub.sets import SETS, parts_of
from osjax.hub.source import Source


def main(argv: Sequence[str], convert: Callable[[Sequence[str]], int]) -> int:
    """Download what the command line `argv` asks for and return the exit status. Raises OsjaxError.

    `convert` is `osjax convert`, a function of its own command line, for --convert.
    """
    parser = Parser("osjax download", description="Download checkpoints; an interrupted download goes on.")
    parser.add_argument("model", nargs="?", default="open-sora-v2", help=f"{', '.join(SETS)}, or OWNER/NAME")
    parser.add_argument("--to", type=Path, default=Path("ckpts"), metavar="FOLDER", help="(default: ckpts)")
    parser.add_argument("--source", choices=("huggingface", "modelscope"), default="huggingface")
    parser.add_argument("--revision", help="branch, tag or commit of the repository")
    parser.add_argument("--convert", action="store_true", help="then make the bundle bundles/MODEL of the folder")
    parser.add_argument("--dry-run", action="store_true", help="list files and sizes, and write nothing")
    args = parser.parse_args(argv)

    parts = parts_of(args.model)
    bundle = Path("bundles", args.model.rpartition("/")[2].replace("-", "_"))
    if args.convert and bundle.exists():
        raise OsjaxError(f"{bundle} exists: remove it, or leave out --convert")
    source = _open_source(args.source)
    plan = download.plan(source, parts, args.to, args.revision)
    if args.dry_run:
        print(plan.table())
    print(plan.describe(), flush=True)
    if args.dry_run:
        return 0
    download.fetch(source, plan)
    words = [str(args.to), str(bundle)]
    if args.convert:
        return convert(words)
    print(f"{args.model} is in {args.to}; next: osjax convert {' '.join(words)}")
    return 0


def _open_source(name: str) -> Source:
    """The hub of that name; its client is imported for it alone."""
    if name == "modelscope":
        from osjax.hub.modelscope import ModelScope

        return ModelScope()
    from osjax.hub.huggingface import HuggingFace

    return HuggingFace()
