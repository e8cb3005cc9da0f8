"""`osjax generate --dry-run True`: what a command would take, and whether it fits; nothing is loaded or written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from osjax.errors import OsjaxError
from osjax.request import Request

if TYPE_CHECKING:
    from osjax.pipeline import Pipeline
    from osjax.preflight import Estimate


def tell(parts: Sequence[tuple[Sequence[Sequence[Request]], Pipeline]]) -> None:
    """Print the estimate of the first group of each kind, then how many of them and what passes it is in all.

    parts: what is drawn one after the other, groups of requests and by whom; what draws one is there for the next.
    Raises OsjaxError, saying what would help, if a group does not fit.
    """
    import jax  # neither above: mistakes in the options are told without it

    from osjax import room

    misfits, counts, passes, beside = [], [], 0, ()
    there, devices = room.least(list(parts[0][1].where.mesh.devices.flat)), jax.device_count()
    free = there and there.free
    for groups, pipeline in parts:
        estimates = [pipeline.estimate(group, beside) for group in groups]
        kinds: dict[tuple, Estimate] = {}
        for each in estimates:
            kinds.setdefault((each.size, each.frames, each.passes), each)  # the first of a kind is the fullest
        for given in kinds.values():
            print(room.describe(pipeline.bundle, given, free, devices), end="\n\n")
            if given.fits(free) is False:
                misfits.append(room.shortage(pipeline.bundle, given, free, devices))
        name = "videos" if pipeline.roles.told_motion else "pictures"
        counts.append(f"{name}: {sum(map(len, groups))}")
        passes += sum(len(group) * each.passes for group, each in zip(groups, estimates, strict=True))
        beside = (*beside, *pipeline.roles.components)
    print(f"{', '.join(counts)}, forward passes in all: {passes}", flush=True)
    if misfits:
        raise OsjaxError(f"it does not fit: {misfits[0]}")
