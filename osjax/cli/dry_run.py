"""`osjax generate --dry-run True`: what a command would take, and whether it fits; nothing is loaded or written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from osjax.errors import OsjaxError
from osjax.request import Request

if TYPE_CHECKING:
    from osjax.pipeline import Pipeline


def tell(parts: Sequence[tuple[Sequence[Sequence[Request]], Pipeline]]) -> None:
    """Print the estimate of the first group of each kind, then how many of them and what passes it is in all.

    parts: what is drawn one after the other, groups of requests and by whom; what draws one is there for the next.
    Raises OsjaxError, saying what would help, if a group does not fit.
    """
    import jax  # neither above: mistakes in the options are told without it

    from osjax import room

    misfits, counts, passes, beside = [], [], 0, ()
    for groups, pipeline in parts:
        estimates = [pipeline.estimate(group, beside) for group in groups]
        there, devices = room.least(list(pipeline.where.mesh.devices.flat)), jax.device_count()
        free = there and there.free
        for given in {(each.size, each.frames, each.passes): each for each in reversed(estimates)}.values():
            print(room.describe(pipeline.bundle, given, free, devices), end="\n\n")
            if given.fits(free) is False:
                misfits.append(room.shortage(pipeline.bundle, given, free, devices))
        name = "videos" if pipeline.roles.told_motion else "pictures"
        counts.append(f"{sum(map(len, groups))} {name}")
        passes += sum(len(group) * each.passes for group, each in zip(groups, estimates, strict=True))
        beside = (*beside, *pipeline.roles.components)
    print(f"{', '.join(counts)}, {passes} forward passes in all", flush=True)
    if misfits:
        raise OsjaxError(f"it does not fit: {misfits[0]}")
