"""The `osjax` command: hands over to a subcommand and turns what goes wrong into one line and an exit status.

0 is success, 2 a mistake the user can mend, 130 Ctrl-C, 141 a reader of our output that went away (128 + SIGPIPE).
Each subcommand is imported when it is called, so that `osjax --help` answers without importing JAX.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from osjax.cli.interrupt import insistent_interrupt
from osjax.cli.parser import Parser
from osjax.errors import OsjaxError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (by default the process's own) and return the exit status."""
    logging.basicConfig(format="%(name)s: %(levelname)s: %(message)s")
    try:
        with insistent_interrupt():
            status = _dispatch(sys.argv[1:] if argv is None else argv)
            sys.stdout.flush()
        return status
    except OsjaxError as error:
        print("osjax: error:", " ".join(str(error).splitlines()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("osjax: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Python flushes stdout once more at exit: give it somewhere to write.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def _dispatch(argv: Sequence[str]) -> int:
    parser = Parser("osjax", description="Open-Sora 2.0 in JAX: text, images and clips to video.")
    parser.add_argument("--version", action="version", version=f"osjax {importlib.metadata.version('osjax')}")
    commands = {
        "generate": _generate,
        "train": _train,
        "download": _download,
        "convert": _convert,
        "bench": _bench,
        "compile": _compile,
        "info": _info,
    }
    parser.add_argument(
        "command",
        choices=commands,
        help="generate: make videos; train: fit a model; download: PyTorch checkpoints; convert: them to a bundle; "
        "bench: how long videos take; compile: what they need, ahead; info: tell",
    )
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="`osjax COMMAND --help` lists them")
    args = parser.parse_args(argv)
    return commands[args.command](args.arguments)


def _generate(argv: Sequence[str]) -> int:
    from osjax.cli import generate

    _prepare_libraries()
    return generate.main(argv)


def _train(argv: Sequence[str]) -> int:
    from osjax.cli import train

    _prepare_libraries()
    return train.main(argv)


def _prepare_libraries() -> None:
    """Variables that JAX and transformers read when they are imported; those that are set already are kept."""
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # PyTorch is not missed
    # What is compiled is kept from run to run: for a short clip on a CPU compiling takes longer than drawing.
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return  # a cache of the user's, perhaps of other programs too: its limits are not ours to set
    with contextlib.suppress(OSError, RuntimeError):  # no place for it, no home: then it is compiled each time
        compiled = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "osjax"
        compiled.mkdir(parents=True, exist_ok=True)
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(compiled)
        os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.3")
        os.environ.setdefault("JAX_COMPILATION_CACHE_MAX_SIZE", str(4 * 2**30))  # the longest unused goes first


def _download(argv: Sequence[str]) -> int:
    from osjax.cli import download

    return download.main(argv, _convert)


def _convert(argv: Sequence[str]) -> int:
    from convert.__main__ import add_arguments, run

    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing is computed: leave accelerators to others
    parser = Parser("osjax convert", description="Convert PyTorch checkpoints to a bundle.")
    add_arguments(parser)
    return run(parser.parse_args(argv))


def _bench(argv: Sequence[str]) -> int:
    from osjax.cli import bench

    _prepare_libraries()
    return bench.main(argv)


def _compile(argv: Sequence[str]) -> int:
    from osjax.cli import compiling

    _prepare_libraries()
    return compiling.main(argv)


def _info(argv: Sequence[str]) -> int:
    from osjax.cli import info

    return info.main(argv)


if __name__ == "__main__":
    sys.exit(main())
