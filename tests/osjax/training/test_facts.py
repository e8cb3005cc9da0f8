"""Facts are those of the scene, in the order it is told in."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from osjax.training import captions
from osjax.training.facts import FACTS, facts_of
from osjax.training.shapes import BACKGROUNDS, COLORS, MOTIONS, SHAPES, Scene, Thing, scene

NAMES = tuple(FACTS)


def test_by_hand():
    star = Thing("star", "blue", "still", "small", 0.14)
    circle = Thing("circle", "red", "right", "large", 0.19)
    made = Scene((circle, star), "navy", 4)
    facts = dict(zip(NAMES, facts_of(made, (star, circle)), strict=True))
    assert facts == {
        "background": tuple(BACKGROUNDS).index("navy"),
        "score": 3,
        "first_color": tuple(COLORS).index("blue"),
        "first_shape": SHAPES.index("star"),
        "first_motion": MOTIONS.index("still"),
        "second_color": tuple(COLORS).index("red"),
        "second_shape": SHAPES.index("circle"),
        "second_motion": MOTIONS.index("right"),
    }


def test_there_is_no_second_thing():
    made = Scene((Thing("circle", "red", "right", "large", 0.19),), "navy", 4)
    facts = dict(zip(NAMES, facts_of(made, made.things), strict=True))
    for name, answers in FACTS.items():
        assert (facts[name] == answers - 1) == name.startswith("second")


@given(seed=st.integers(0, 2**31), index=st.integers(0, 1000), held_out=st.booleans())
@settings(deadline=None, max_examples=60)
def test_what_is_told_first_has_the_first_facts(seed, index, held_out):
    made = scene(seed, index, held_out=held_out)
    told = captions.tell(made, np.random.default_rng(index))
    facts = facts_of(made, told.things)
    assert facts.dtype == np.int32
    assert all(0 <= fact < answers for fact, answers in zip(facts, FACTS.values(), strict=True))
    again = [
        (tuple(COLORS)[color], SHAPES[shape], MOTIONS[motion])
        for color, shape, motion in facts[2:].reshape(-1, 3)[: len(made.things)]
    ]
    assert again == [(thing.color, thing.shape, thing.motion) for thing in told.things]
    assert sorted(again) == sorted((thing.color, thing.shape, thing.motion) for thing in made.things)
