"""The device mesh. There is always one, even of a single device, so that no code asks whether it runs sharded.

Sampling and training each have their axes: see `MeshShape` and `TrainingMeshShape`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TypeVar

import jax
import numpy as np
from jax.sharding import Mesh

from osjax.errors import OsjaxError


@dataclasses.dataclass(frozen=True)
class _Axes:
    """Devices along each axis: the fields of a subclass."""

    @property
    def devices(self) -> int:
        return math.prod(dataclasses.astuple(self))

    def __str__(self) -> str:
        return ",".join(f"{name}={size}" for name, size in dataclasses.asdict(self).items())


@dataclasses.dataclass(frozen=True)
class MeshShape(_Axes):
    """Sampling: `data` shards the batch, `seq` the joint token sequence."""

    data: int = 1
    seq: int = 1


@dataclasses.dataclass(frozen=True)
class TrainingMeshShape(_Axes):
    """Training: `data` and `fsdp` shard the batch, `fsdp` the weights too, `tensor` heads and MLP columns."""

    data: int = 1
    fsdp: int = 1
    tensor: int = 1


Shape = TypeVar("Shape", bound=_Axes)


def parse_mesh(text: str, kind: type[Shape] = MeshShape) -> Shape:
    """`data=2,seq=4` → MeshShape; axes left out have size 1. Raises OsjaxError for anything else."""
    known = [field.name for field in dataclasses.fields(kind)]
    sizes: dict[str, int] = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, size = (piece.strip() for piece in part.partition("="))
        if name not in known or name in sizes or not size.isdecimal() or int(size) < 1:
            raise OsjaxError(
                f"mesh {text!r} is not understood at {part!r}: write it like data=2,{known[1]}=4 ({', '.join(known)})"
            )
        sizes[name] = int(size)
    return kind(**sizes)


def make_mesh(shape: _Axes, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh over the first `shape.devices` of `devices` (all local and remote ones by default).

    Raises OsjaxError if there are fewer.
    """
    devices = jax.devices() if devices is None else devices
    if shape.devices > len(devices):
        raise OsjaxError(
            f"mesh {shape} needs {shape.devices} devices but there are {len(devices)}: choose a smaller --mesh"
        )
    sizes = dataclasses.asdict(shape)
    return Mesh(np.asarray(devices[: shape.devices]).reshape(*sizes.values()), tuple(sizes))
