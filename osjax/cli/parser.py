"""argparse with one-line errors: every mistake on the command line is an OsjaxError."""

from __future__ import annotations

import argparse
from typing import NoReturn

from osjax.errors import OsjaxError


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that takes no abbreviations and raises OsjaxError where argparse would print usage and exit."""

    def __init__(self, prog: str, **options: object) -> None:
        super().__init__(prog, allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        """Raise `message` with the way to the help."""
        raise OsjaxError(f"{message.removeprefix('argument ')}: see `{self.prog} --help`")
