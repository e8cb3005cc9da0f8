"""Shapes, the procedural data set: which scenes there are, and how they move.

A scene is one or two things on a plain background. All of it happens on a stage, the square of the frame's shorter
side; positions and radii are in units of that side, x to the right and y down, so that one scene fits any frame. Where
a longer frame holds its stage is part of the scene; one that has room for two stages gives each thing its own.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools

import numpy as np

from osjax.errors import OsjaxError

SHAPES = ("circle", "square", "triangle", "star")
# RGB; every two colours of either table, and one of each, are over 90 apart, so that they survive blur and coding.
COLORS = {
    "red": (225, 20, 50),
    "green": (50, 205, 60),
    "blue": (40, 110, 250),
    "yellow": (250, 245, 50),
    "purple": (165, 40, 225),
    "orange": (255, 135, 0),
    "white": (255, 255, 255),
}
BACKGROUNDS = {
    "black": (0, 0, 0),
    "grey": (128, 128, 128),
    "navy": (20, 30, 120),
    "teal": (0, 120, 130),
    "brown": (110, 60, 20),
}
DIAGONAL = 0.5**0.5
HEADINGS = {
    "left": (-1.0, 0.0),
    "right": (1.0, 0.0),
    "up": (0.0, -1.0),
    "down": (0.0, 1.0),
    "up-left": (-DIAGONAL, -DIAGONAL),
    "up-right": (DIAGONAL, -DIAGONAL),
    "down-left": (-DIAGONAL, DIAGONAL),
    "down-right": (DIAGONAL, DIAGONAL),
}
MOTIONS = (*HEADINGS, "bouncing", "spinning", "growing", "shrinking", "still")
RADII = {"small": 0.14, "large": 0.19}
RADIUS_JITTER = 0.03
SCORES = range(1, 8)
SECONDS = 32 / 24  # 33 frames at 24 a second, the first at 0
GAP = 0.04  # between two things
TWO_THINGS_SHARE = 0.28
MOMENTS = np.linspace(0.0, 1.0, 65)  # of a clip, in parts of SECONDS, that two things are kept apart at
_PLACES_TRIED = 32


@dataclasses.dataclass(frozen=True)
class Thing:
    """One thing of a scene: what a caption says of it, then what it leaves open.

    radius: of the circle around it, in the middle of the clip for what grows or shrinks; x, y: of its centre at the
    start; angle: at the start, radians; spin: +1 or -1, the sense in which it turns if it does; heading: unit vector of
    its way, of the way it sets out for what bounces; band, first: of what bounces, the length of the track that it goes
    to and fro on, and how far its first turning point is.
    """

    shape: str
    color: str
    motion: str
    size: str
    radius: float
    x: float = 0.5
    y: float = 0.5
    angle: float = 0.0
    spin: int = 1
    heading: tuple[float, float] = (0.0, 0.0)
    band: float = 0.0
    first: float = 0.0


@dataclasses.dataclass(frozen=True)
class Scene:
    """A clip before it is drawn. score: of motion, 1 to 7; stage: where the stage lies in the room that the longer side
    leaves, from 0 (left or top) to 1."""

    things: tuple[Thing, ...]
    background: str
    score: int
    stage: float = 0.5


def is_held_out(color: str, shape: str, motion: str) -> bool:
    """Whether training never shows this triple: a tenth of them, chosen by a hash and so the same everywhere."""
    return hashlib.sha256(f"a {color} {shape} {motion}".encode()).digest()[0] % 10 == 0


def triples(held_out: bool) -> tuple[tuple[str, str, str], ...]:
    """The (colour, shape, motion) that are held out, or the others. A circle that spins cannot be seen to."""
    every = itertools.product(COLORS, SHAPES, MOTIONS)
    return tuple(each for each in every if each[1:] != ("circle", "spinning") and is_held_out(*each) == held_out)


_TRIPLES = {held_out: triples(held_out) for held_out in (False, True)}


def scene(seed: int, index: int, *, held_out: bool = False, two_things: float = TWO_THINGS_SHARE) -> Scene:
    """Scene number `index` of an endless list: any of them alone, the same whenever it is asked for."""
    return sample_scene(np.random.default_rng((seed, index)), held_out=held_out, two_things=two_things)


def sample_scene(rng: np.random.Generator, *, held_out: bool = False, two_things: float = TWO_THINGS_SHARE) -> Scene:
    """Draws a scene, all of whose things are of held-out triples, or none. two_things: how likely it has two things.

    Two things differ in colour or shape and never come closer than GAP; nothing leaves the stage within SECONDS.
    """
    score = int(rng.integers(SCORES.start, SCORES.stop))
    background = str(rng.choice(tuple(BACKGROUNDS)))
    count = 2 if rng.random() < two_things else 1
    things = None
    while things is None:  # most pairs of slow or small things have a place, so this ends soon
        things = _place([_sample_thing(rng, score, held_out) for _ in range(count)], score, rng)
    return Scene(things, background, score, float(rng.random()))


def travel(score: float) -> float:
    """How far a thing moves in SECONDS, in sides of the stage: 0.1 at score 1, 0.6 at score 7."""
    return 0.1 + (score - 1) / 12


def bounce_travel(score: float) -> float:
    """The way of a thing that bounces, there and back: 0.3 at score 1, 1.2 at score 7."""
    return 0.3 + 0.15 * (score - 1)


def turn(score: float) -> float:
    """Radians that a thing spins by in SECONDS: an eighth of a turn for each point of the score.

    At 24 frames a second that stays below half of a star's symmetry, 36 degrees a frame, so that the sense is seen.
    """
    return np.pi / 4 * score


def growth(score: float) -> float:
    """The factor by which a radius changes in SECONDS: 1.25 at score 1, 2.5 at score 7."""
    return 1.25 + (score - 1) * 1.25 / 6


def trajectory(thing: Thing, score: int, progress: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where a thing is at `progress` [T], parts of SECONDS: (centre [T, 2], radius [T], angle [T])."""
    heading, along = np.asarray(thing.heading), np.zeros_like(progress)
    radius, angle = np.full_like(progress, thing.radius), np.full_like(progress, thing.angle)
    if thing.motion in HEADINGS:
        along = travel(score) * progress
    elif thing.motion == "bouncing":
        along = _fold(bounce_travel(score) * progress, thing.band, thing.first)
    elif thing.motion == "spinning":
        angle = angle + thing.spin * turn(score) * progress
    elif thing.motion == "growing":
        radius = radius * growth(score) ** (progress - 0.5)
    elif thing.motion == "shrinking":
        radius = radius * growth(score) ** (0.5 - progress)
    return np.array([thing.x, thing.y]) + along[:, None] * heading, radius, angle


def check_length(num_frames: int, fps: float) -> None:
    """Raises OsjaxError for a clip in which things would leave the stage."""
    if (num_frames - 1) / fps > SECONDS + 1e-9:
        longest = int(SECONDS * fps + 1e-9) + 1
        raise OsjaxError(f"{num_frames} frames at {fps:g} a second are too long for shapes: use at most {longest}")


def _fold(way: np.ndarray, band: float, first: float) -> np.ndarray:
    """How far along its first heading a thing is that has gone `way` on a track and turned at both of its ends."""
    from_far_end = band - np.abs((way + band - first) % (2 * band) - band)
    return from_far_end - (band - first)


def _sample_thing(rng: np.random.Generator, score: int, held_out: bool) -> Thing:
    """A thing in the middle of the stage, without regard to what is around it."""
    choices = _TRIPLES[held_out]
    color, shape, motion = choices[rng.integers(len(choices))]
    size = str(rng.choice(tuple(RADII)))
    radius = RADII[size] * rng.uniform(1 - RADIUS_JITTER, 1 + RADIUS_JITTER)
    thing = Thing(shape, color, motion, size, radius, spin=int(rng.choice((-1, 1))))
    if motion in HEADINGS:
        return dataclasses.replace(thing, heading=HEADINGS[motion])
    if motion == "spinning":
        return dataclasses.replace(thing, angle=rng.uniform(0, 2 * np.pi))
    if motion == "bouncing":
        band = rng.uniform(0.4, 1 - 2 * radius)
        first = min(bounce_travel(score) * rng.uniform(0.3, 0.7), band)  # so that it turns around within the clip
        heading = HEADINGS[str(rng.choice(("left", "right", "up", "down")))]
        return dataclasses.replace(thing, heading=heading, band=band, first=first)
    return thing


def _place(things: list[Thing], score: int, rng: np.random.Generator) -> tuple[Thing, ...] | None:
    """The things at random places that keep them on the stage and apart, or None if no place was found."""
    if len({(thing.color, thing.shape) for thing in things}) < len(things):
        return None
    paths, starts = [], []
    for thing in things:
        centre, radius, _ = trajectory(dataclasses.replace(thing, x=0.0, y=0.0), score, MOMENTS)
        reach = centre  # what bounces is given its whole track, because it may turn around between two moments
        if thing.motion == "bouncing":
            reach = np.outer((thing.first, thing.first - thing.band), thing.heading)
        low, high = radius.max() - reach.min(axis=0), 1 - radius.max() - reach.max(axis=0)
        starts.append(rng.uniform(low, high, (_PLACES_TRIED, 2)))
        paths.append((centre + starts[-1][:, None], radius))
    free = np.ones(_PLACES_TRIED, bool)
    for (a, radius_a), (b, radius_b) in itertools.combinations(paths, 2):
        free &= (np.linalg.norm(a - b, axis=-1) > radius_a + radius_b + GAP).all(axis=1)
    if not free.any():
        return None
    at = free.argmax()
    return tuple(
        dataclasses.replace(thing, x=float(start[at, 0]), y=float(start[at, 1]))
        for thing, start in zip(things, starts, strict=True)
    )
