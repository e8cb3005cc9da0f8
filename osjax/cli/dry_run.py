"""`osjax generate --dry-run True`: what a command would take, and whether it fits; nothing is loaded or written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from osjax.errors import OsjaxError
from osjax.request import Request

if TYPE_CHECKING:
    from osjax.pipeline import Pipeline


def tell(groups: Sequence[Sequence[Request]], pipeline: Pipeline) -> None:
    """Print the estimate of the first group of each kind, then the videos and passes of all.

    groups: requests that are to be drawn together. Raises OsjaxError, saying what would help, if one does not fit.
    """
    import jax  # neither above: mistakes in the options are told without it

    from osjax import room

    there, devices = room.least(list(pipeline.where.mesh.devices.flat)), jax.device_count()
    free = there and there.free
    told, misfits, passes = set(), [], 0
    for group in groups:
        given = pipeline.estimate(group)
        passes += len(group) * given.passes
        kind = (given.size, given.frames, given.passes)
        if kind in told:
            continue
        told.add(kind)
        print(room.describe(pipeline.bundle, given, free, devices), end="\n\n")
        if given.fits(free) is False:
            misfits.append(room.shortage(pipeline.bundle, given, free, devices))
    print(f"{sum(map(len, groups))} videos, {passes} forward passes in all", flush=True)
    if misfits:
        raise OsjaxError(f"it does not fit: {misfits[0]}")
