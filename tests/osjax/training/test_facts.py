"""Facts are those of the scene, in the order it is told in."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from osjax.training import captions
from osjax.training.captions import Mention
from osjax.training.facts import FACTS, facts_of
from osjax.training.shapes import BACKGROUNDS, COLORS, MOTIONS, SHAPES, Scene, Thing, scene

NAMES = tuple(FACTS)


def test_by_hand():
    star = Thing("star", "blue", "bouncing", "small", 0.14, heading=(0.0, 1.0))
    circle = Thing("circle", "red", "right", "large", 0.19)
    made = Scene((circle, star), "navy", 4)
    facts = dict(zip(NAMES, facts_of(made, (Mention(star, None, True), Mention(circle, "large", None))), strict=True))
    assert facts == {
        "background": tuple(BACKGROUNDS).index("navy"),
        "score": 3,
        "first_color": tuple(COLORS).index("blue"),
        "first_shape": SHAPES.index("star"),
        "first_motion": MOTIONS.index("bouncing"),
        "first_size": 2,
        "first_vertical": 0,
        "second_color": tuple(COLORS).index("red"),
        "second_shape": SHAPES.index("circle"),
        "second_motion": MOTIONS.index("right"),
        "second_size": 1,
        "second_vertical": 2,
    }


def test_there_is_no_second_thing():
    made = Scene((Thing("circle", "red", "right", "large", 0.19),), "navy", 4)
    facts = dict(zip(NAMES, facts_of(made, [Mention(made.things[0], "large", None)]), strict=True))
    for name, answers in FACTS.items():
        assert (facts[name] == answers - 1) == name.startswith("second")


@given(seed=st.integers(0, 2**31), index=st.integers(0, 1000), held_out=st.booleans())
@settings(deadline=None, max_examples=60)
def test_what_is_told_first_has_the_first_facts(seed, index, held_out):
    made = scene(seed, index, held_out=held_out)
    told = captions.tell(made, np.random.default_rng(index))
    facts = facts_of(made, told.mentions)
    assert facts.dtype == np.int32
    assert all(0 <= fact < answers for fact, answers in zip(facts, FACTS.values(), strict=True))
    again = [
        (tuple(COLORS)[color], SHAPES[shape], MOTIONS[motion])
        for color, shape, motion, _, _ in facts[2:].reshape(2, -1)[: len(made.things)]
    ]
    assert again == [(thing.color, thing.shape, thing.motion) for thing, _, _ in told.mentions]
    assert sorted(again) == sorted((thing.color, thing.shape, thing.motion) for thing in made.things)


@given(seed=st.integers(0, 2**31))
@settings(deadline=None, max_examples=60)
def test_what_is_said_of_size_and_way_is_in_the_sentence(seed):
    made = scene(seed, 0)
    text, mentions = captions.tell(made, np.random.default_rng(seed))
    sizes = [size for _, size, _ in mentions if size]
    words = text.lower().split()
    assert sorted(sizes) == sorted(
        {"big": "large"}.get(word, word) for word in words if word in ("small", "large", "big")
    )
    ways = {vertical for _, _, vertical in mentions} - {None}
    assert (True in ways) == ("up and down" in text)
    assert (False in ways) == ("side to side" in text or "left and right" in text)
