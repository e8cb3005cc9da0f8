"""`osjax info`: how a file was made, or what this installation runs on."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Sequence

from osjax import provenance
from osjax.cli.parser import Parser

_PACKAGES = ("osjax", "jax", "jaxlib", "flax", "orbax-checkpoint", "transformers", "av")


def main(argv: Sequence[str]) -> int:
    """Print what the command line `argv` asks for and return the exit status. Raises OsjaxError."""
    parser = Parser("osjax info", description="The provenance of FILE; without FILE, versions and devices.")
    parser.add_argument("file", nargs="?", metavar="FILE", help=".mp4, .png or .json that osjax wrote")
    args = parser.parse_args(argv)
    print(provenance.read(args.file).to_json() if args.file else _installation())
    return 0


def _installation() -> str:
    import jax  # not above: FILE is answered without it

    lines = [f"python {platform.python_version()}"]
    lines += [f"{name} {importlib.metadata.version(name)}" for name in _PACKAGES]
    lines += [f"device {device.id}: {device.device_kind} ({device.platform})" for device in jax.devices()]
    return "\n".join(lines)
