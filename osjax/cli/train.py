"""`osjax train`: options → a run in its folder, or the table of a data set."""

from __future__ import annotations

from collections.abc import Sequence

from osjax.cli import train_options
from osjax.cli.train_options import Prepare, Run
from osjax.errors import OsjaxError


def main(argv: Sequence[str]) -> int:
    """Do what the command line `argv` asks for and return the exit status. Raises OsjaxError."""
    asked = train_options.read(argv)
    if isinstance(asked, Prepare):
        _prepare(asked)
    else:
        _run(asked)
    return 0


def _run(asked: Run) -> None:
    # Not above: JAX, and mistakes in the options should be told at once.
    from osjax.training import loop, snapshots

    if asked.anew and snapshots.exists(asked.folder):
        raise OsjaxError(f"{asked.folder} holds a run already: give another --out, or leave out --resume never")
    loop.run(asked.config, asked.folder, force=asked.force)


def _prepare(asked: Prepare) -> None:
    from osjax.training import prepare  # not above: PyAV and NumPy

    print(prepare.prepare(asked.table, asked.folder, progress=True))
