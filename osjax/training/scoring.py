"""Scene against reading: what of a prompt a clip shows, and in how many clips."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np

from osjax.media import to_model
from osjax.training import autoencode
from osjax.training.reading import Reading, Seen
from osjax.training.shapes import Scene, Thing


@dataclasses.dataclass(frozen=True)
class Score:
    """What is right in one clip. color, shape, motion: of every thing of the scene; complete: all three of these.

    speed: what the first thing moves at, as a motion score; None if the clip shows no such thing.
    """

    background: bool
    count: bool
    color: bool
    shape: bool
    motion: bool
    speed: float | None

    @property
    def complete(self) -> bool:
        return self.color and self.shape and self.motion


@dataclasses.dataclass(frozen=True)
class Scores:
    """Shares of clips in percent; None where no prompt asks.

    background, count: of all; color, shape, motion and all_three at once: of prompts of one thing; two_right: of
    prompts of two things, those where all three attributes of both are right; speed: Spearman's rank correlation, from
    -1 to 1, of the speed measured with the motion score asked for, over single things that ought to move.
    """

    prompts: int
    background: float | None
    count: float | None
    color: float | None
    shape: float | None
    motion: float | None
    all_three: float | None
    two_right: float | None
    speed: float | None


def score(scene: Scene, reading: Reading) -> Score:
    """Compares; which thing is meant by which is decided in the clip's favour."""
    pairs = match(scene, reading)
    first = pairs[0][1]
    return Score(
        background=reading.background == scene.background,
        count=len(reading.things) == len(scene.things),
        color=all(seen is not None and seen.color == thing.color for thing, seen in pairs),
        shape=all(seen is not None and seen.shape == thing.shape for thing, seen in pairs),
        motion=all(seen is not None and seen.motion == thing.motion for thing, seen in pairs),
        speed=None if first is None else first.speed,
    )


def match(scene: Scene, reading: Reading) -> list[tuple[Thing, Seen | None]]:
    """Each thing of a scene with one that was seen, so that as many attributes agree as can; None if too few were."""
    candidates = (*reading.things, *[None] * len(scene.things))
    orders = itertools.permutations(candidates, len(scene.things))
    return max(
        (list(zip(scene.things, order, strict=True)) for order in orders),
        key=lambda pairs: sum(_agreement(thing, seen) for thing, seen in pairs),
    )


def summarise(scenes: Sequence[Scene], scores: Sequence[Score]) -> Scores:
    """The figures of many clips."""
    pairs = list(zip(scenes, scores, strict=True))
    one = [each for made, each in pairs if len(made.things) == 1]
    two = [each for made, each in pairs if len(made.things) == 2]
    moving = [
        (made.score, each.speed)
        for made, each in pairs
        if len(made.things) == 1 and made.things[0].motion != "still" and each.speed is not None
    ]
    return Scores(
        prompts=len(pairs),
        background=_percent([each.background for each in scores]),
        count=_percent([each.count for each in scores]),
        color=_percent([each.color for each in one]),
        shape=_percent([each.shape for each in one]),
        motion=_percent([each.motion for each in one]),
        all_three=_percent([each.complete for each in one]),
        two_right=_percent([each.complete for each in two]),
        speed=_rank_correlation(moving),
    )


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB of two uint8 arrays of one shape; infinite if they are equal."""
    return float(autoencode.psnr(np.mean((to_model(a) - to_model(b)) ** 2)))


def _agreement(thing: Thing, seen: Seen | None) -> float:
    """How many attributes agree; being there at all counts a little."""
    if seen is None:
        return 0.0
    return 0.1 + sum(getattr(thing, name) == getattr(seen, name) for name in ("color", "shape", "motion"))


def _percent(values: Sequence[bool]) -> float | None:
    return round(100 * float(np.mean(values)), 1) if values else None


def _rank_correlation(pairs: Sequence[tuple[float, float]]) -> float | None:
    from scipy.stats import spearmanr  # not above: it takes half a second to import

    first, second = zip(*pairs, strict=True) if pairs else ((), ())
    if len(set(first)) < 2 or len(set(second)) < 2:
        return None
    return round(float(spearmanr(first, second).statistic), 3)
