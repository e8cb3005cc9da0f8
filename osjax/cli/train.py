"""`osjax train`: options → a run in its folder, or the table of a data set."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from osjax.cli import train_options
from osjax.cli.train_options import Prepare, Run
from osjax.errors import OsjaxError

_STOPPED = 130  # 128 + SIGINT, as for the other commands; whoever waits for the run can tell it from one that ended


def main(argv: Sequence[str]) -> int:
    """Do what the command line `argv` asks for and return the exit status. Raises OsjaxError."""
    asked = train_options.read(argv)
    return _prepare(asked) if isinstance(asked, Prepare) else _run(asked)


def _run(asked: Run) -> int:
    # Not above: JAX, and mistakes in the options should be told at once.
    from osjax.training import loop, snapshots

    if asked.anew and snapshots.exists(asked.folder):
        raise OsjaxError(f"{asked.folder} holds a run already: give another --out, or leave out --resume never")
    ended = loop.run(asked.config, asked.folder, force=asked.force)
    if ended.exported is None:
        print(f"osjax: stopped and saved at step {ended.steps}: the same command goes on", file=sys.stderr)
        return _STOPPED
    print(ended.exported)
    return 0


def _prepare(asked: Prepare) -> int:
    from osjax.training import prepare  # not above: PyAV and NumPy

    print(prepare.prepare(asked.table, asked.folder))
    return 0
