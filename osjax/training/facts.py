"""What a caption says, as numbers: the facts of its scene, things in the order that it tells of them.

Each fact has answers of its own. None is about two things or two attributes at once: a text encoder that learns to tell
colours, shapes and motions apart, each by itself, also tells those together that were never shown together. (With
answers for pairs of attributes, encoders learned the triples that training has, and 2 to 24 % of others.)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from osjax.training.shapes import BACKGROUNDS, COLORS, MOTIONS, SCORES, SHAPES, Scene, Thing

_TOLD = ("first", "second")  # things
_OF_A_THING = {"color": tuple(COLORS), "shape": SHAPES, "motion": MOTIONS}
# Fact → how many answers it has; one answer of a thing's facts is that there is no such thing.
FACTS = {"background": len(BACKGROUNDS), "score": len(SCORES)} | {
    f"{which}_{name}": len(answers) + 1 for which in _TOLD for name, answers in _OF_A_THING.items()
}


def facts_of(scene: Scene, things: Sequence[Thing]) -> np.ndarray:
    """The number of the right answer to each of FACTS, int32 [F]. things: those of the scene, as they are told."""
    right = [tuple(BACKGROUNDS).index(scene.background), SCORES.index(scene.score)]
    for thing in (*things, *[None] * (len(_TOLD) - len(things))):
        for name, answers in _OF_A_THING.items():
            right.append(len(answers) if thing is None else answers.index(getattr(thing, name)))
    return np.array(right, np.int32)
