"""What a caption says, as numbers: the facts of its scene, things in the order that it tells of them.

Each fact has answers of its own. None is about two things or two attributes at once: a text encoder that learns to tell
colours, shapes and motions apart, each by itself, also tells those together that were never shown together. (With
answers for pairs of attributes, encoders learned the triples that training has, and 2 to 24 % of others.)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from osjax.training.captions import Mention
from osjax.training.shapes import BACKGROUNDS, COLORS, MOTIONS, RADII, SCORES, SHAPES, Scene

_TOLD = ("first", "second")  # things
# What may be said of a thing; None: that it is left open.
_OF_A_THING = {
    "color": tuple(COLORS),
    "shape": SHAPES,
    "motion": MOTIONS,
    "size": (*RADII, None),
    "vertical": (True, False, None),
}
# Fact → how many answers it has; one answer of a thing's facts is that there is no such thing.
FACTS = {"background": len(BACKGROUNDS), "score": len(SCORES)} | {
    f"{which}_{name}": len(answers) + 1 for which in _TOLD for name, answers in _OF_A_THING.items()
}


def facts_of(scene: Scene, mentions: Sequence[Mention]) -> np.ndarray:
    """The number of the right answer to each of FACTS, int32 [F]. mentions: of the scene's things, as they are told."""
    right = [tuple(BACKGROUNDS).index(scene.background), SCORES.index(scene.score)]
    for thing, size, vertical in mentions:
        said = (thing.color, thing.shape, thing.motion, size, vertical)
        right += [answers.index(each) for answers, each in zip(_OF_A_THING.values(), said, strict=True)]
    for _ in _TOLD[len(mentions) :]:
        right += map(len, _OF_A_THING.values())
    return np.array(right, np.int32)
