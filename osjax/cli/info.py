"""`osjax info`: how a file was made, or what this installation is made of and runs on."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Sequence
from typing import TYPE_CHECKING

from osjax import provenance
from osjax.cli.parser import Parser

if TYPE_CHECKING:
    import jax

_PACKAGES = ("osjax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "transformers", "av")
_PLUGINS = ("jax-cuda12-plugin", "jax-cuda12-pjrt", "jax-cuda13-plugin", "jax-cuda13-pjrt")  # where there is a GPU


def main(argv: Sequence[str]) -> int:
    """Print what the command line `argv` asks for and return the exit status. Raises OsjaxError."""
    parser = Parser("osjax info", description="The provenance of FILE; without FILE, versions, devices and kernels.")
    parser.add_argument("file", nargs="?", metavar="FILE", help=".mp4, .png or .json that osjax wrote")
    args = parser.parse_args(argv)
    print(provenance.read(args.file).to_json() if args.file else _installation())
    return 0


def _installation() -> str:
    import jax  # not above, nor what imports it: FILE is answered without it
    from jax.extend.backend import get_backend

    lines = [f"python {platform.python_version()}"]
    lines += [f"{name} {version}" for name in (*_PACKAGES, *_PLUGINS) if (version := _version(name))]
    lines.append(f"platform {' '.join(get_backend().platform_version.split())}")
    lines += [f"device {device.id}: {_device(device)}" for device in jax.devices()]
    return "\n".join([*lines, *_attention(jax.devices()[0])])


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _device(device: jax.Device) -> str:
    from osjax.room import gigabytes, memory

    there = memory(device)
    told = f"{gigabytes(there.free)} of {gigabytes(there.total)} GB free" if there else "memory not known"
    return f"{device.device_kind} ({device.platform}), {told}"


def _attention(device: jax.Device) -> list[str]:
    """For each kernel and dtype whether it runs on the device, or why not."""
    from osjax.kernels.attention import NAMES, why_not
    from osjax.pipeline import DTYPES

    reasons = {(kernel, name): why_not(kernel, device, dtype) for kernel in NAMES[1:] for name, dtype in DTYPES.items()}
    return [f"attention {kernel}, {name}: {reason or 'runs'}" for (kernel, name), reason in reasons.items()]
