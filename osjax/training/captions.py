"""What is said about a scene: sentences from templates, as many wordings as make a reader generalise.

The motion score is not said here; `osjax.text.annotate` adds it to every prompt alike.
"""

from __future__ import annotations

import itertools
import re
from typing import NamedTuple

import numpy as np

from osjax.training.shapes import BACKGROUNDS, COLORS, HEADINGS, SHAPES, Scene, Thing, scene

# {it}: the thing, {moves} and {moving}: what it does, {bg}: the background's colour with its article.
ONE = (
    "{it} {moves} on {bg} background",
    "{it} {moves} against {bg} background",
    "{it} {moves} in front of {bg} background",
    "{it} on {bg} background {moves}",
    "{it} is {moving} on {bg} background",
    "{it} is {moving} in front of {bg} background",
    "{it} {moving} on {bg} background",
    "{it} {moving} against {bg} background",
    "on {bg} background, {it} {moves}",
    "against {bg} background {it} is {moving}",
    "a video of {it} {moving} on {bg} background",
    "a clip that shows {it} {moving} on {bg} background",
    "there is {it} on {bg} background, it {moves}",
    "the background is {color} and {it} {moves}",
    "{it} {moves}, the background is {color}",
    "{it} {moves} over {bg} backdrop",
)
TWO = (
    "{it} {moves} and {other} {other_moves} on {bg} background",
    "{it} {moves} while {other} {other_moves} on {bg} background",
    "on {bg} background, {it} {moves} and {other} {other_moves}",
    "{it} is {moving} and {other} is {other_moving} on {bg} background",
    "{it} {moving} and {other} {other_moving} against {bg} background",
    "a video of {it} {moving} and {other} {other_moving} on {bg} background",
    "there are two shapes on {bg} background: {it} {moves} and {other} {other_moves}",
    "the background is {color}, {it} {moves} and {other} {other_moves}",
    "{it} {moves}, {other} {other_moves}, the background is {color}",
)
GO = (("moves", "moving"), ("drifts", "drifting"), ("slides", "sliding"), ("glides", "gliding"))
WAYS = {
    "left": ("to the left", "left", "leftwards", "from right to left"),
    "right": ("to the right", "right", "rightwards", "from left to right"),
    "up": ("up", "upwards", "towards the top"),
    "down": ("down", "downwards", "towards the bottom"),
    "up-left": ("diagonally up and to the left", "up and to the left", "to the upper left"),
    "up-right": ("diagonally up and to the right", "up and to the right", "to the upper right"),
    "down-left": ("diagonally down and to the left", "down and to the left", "to the lower left"),
    "down-right": ("diagonally down and to the right", "down and to the right", "to the lower right"),
}
DOES = {
    "bouncing": (("bounces", "bouncing"), ("keeps bouncing", "bouncing")),
    "spinning": (("spins", "spinning"), ("rotates", "rotating"), ("spins in place", "spinning in place")),
    "growing": (("grows", "growing"), ("gets bigger", "getting bigger"), ("becomes larger", "becoming larger")),
    "shrinking": (("shrinks", "shrinking"), ("gets smaller", "getting smaller"), ("becomes smaller", "shrinking")),
    "still": (("stands still", "standing still"), ("does not move", "not moving"), ("stays still", "staying still")),
}
BOUNCES_ALONG = {True: ("up and down",), False: ("from side to side", "left and right")}  # whether vertical
SIZES = {"small": ("small",), "large": ("large", "big")}
ALSO_CALLED = {"grey": "gray"}
SIZE_SAID_SHARE = 0.5
CAPITAL_SHARE = 0.25


class Mention(NamedTuple):
    """A thing as a sentence tells of it. size: as said; vertical: of the way that it bounces, whether it is said to be
    up and down (True) or from side to side (False). None for what the sentence leaves open."""

    thing: Thing
    size: str | None
    vertical: bool | None


class Told(NamedTuple):
    """A sentence, without a full stop, and the things that it tells of in its order."""

    text: str
    mentions: tuple[Mention, ...]


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """One of the many sentences that are true of a scene, without a full stop."""
    return tell(scene, rng).text


def tell(scene: Scene, rng: np.random.Generator) -> Told:
    """Tells of a scene. Of two things either comes first; a size that is not said may be any."""
    things = tuple(scene.things[i] for i in rng.permutation(len(scene.things)))
    color = _one_of((scene.background, ALSO_CALLED.get(scene.background, scene.background)), rng)
    slots, mentions = {"bg": _with_article(color), "color": color}, []
    for thing, prefix in zip(things, ("", "other_"), strict=False):
        slots[prefix.rstrip("_") or "it"], size = _name(thing, rng)
        slots[prefix + "moves"], slots[prefix + "moving"], vertical = _action(thing, rng)
        mentions.append(Mention(thing, size, vertical))
    sentence = _one_of(ONE if len(things) == 1 else TWO, rng).format(**slots)
    if rng.random() < CAPITAL_SHARE:
        sentence = sentence[0].upper() + sentence[1:]
    return Told(sentence, tuple(mentions))


def corpus(n: int, seed: int) -> list[str]:
    """Captions of training scenes, for a tokenizer to learn from. They hold the vocabulary if there are many."""
    return [caption(scene(seed, i), np.random.default_rng((seed, i, 1))) for i in range(n)]


def vocabulary() -> set[str]:
    """Every word that captions are made of, in lower case."""
    verbs = itertools.chain.from_iterable(itertools.chain(GO, *DOES.values()))
    phrases = itertools.chain(*WAYS.values(), *BOUNCES_ALONG.values(), *SIZES.values(), verbs)
    templates = (re.sub(r"{\w+}", "", template) for template in (*ONE, *TWO))
    names = (*COLORS, *BACKGROUNDS, *ALSO_CALLED.values(), *SHAPES, "a", "an")
    return set(re.findall(r"\w+", " ".join((*phrases, *templates, *names))))


def _name(thing: Thing, rng: np.random.Generator) -> tuple[str, str | None]:
    """What a thing is called, and its size if that is said."""
    size = [_one_of(SIZES[thing.size], rng)] if rng.random() < SIZE_SAID_SHARE else []
    return _with_article(" ".join([*size, thing.color, thing.shape])), thing.size if size else None


def _action(thing: Thing, rng: np.random.Generator) -> tuple[str, str, bool | None]:
    """What a thing does: finite verb phrase, participle phrase, and whether it bounces up and down if that is said."""
    if thing.motion in HEADINGS:
        verbs, ways = _one_of(GO, rng), WAYS[thing.motion]
    else:
        verbs, ways = _one_of(DOES[thing.motion], rng), ("",)
    vertical = thing.heading[0] == 0
    if thing.motion == "bouncing":
        ways = ("", *BOUNCES_ALONG[vertical])
    way = _one_of(ways, rng)
    moves, moving = (f"{verb} {way}".rstrip() for verb in verbs)
    return moves, moving, vertical if thing.motion == "bouncing" and way else None


def _with_article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _one_of(choices: tuple, rng: np.random.Generator) -> object:
    return choices[rng.integers(len(choices))]
