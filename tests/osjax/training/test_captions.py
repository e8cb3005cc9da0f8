"""Captions say what is true of a scene, nothing else, in many ways."""

import re

import numpy as np
import pytest

from osjax.training import captions
from osjax.training.shapes import BACKGROUNDS, COLORS, HEADINGS, SHAPES, Scene, Thing, scene

RED_CIRCLE = Scene((Thing("circle", "red", "right", "large", 0.19),), "navy", 4)
DRAWS = 3000


def sentences(made, n=DRAWS):
    rng = np.random.default_rng(0)
    return {captions.caption(made, rng) for _ in range(n)}


def test_the_example_is_among_the_sentences():
    said = sentences(RED_CIRCLE)
    assert "a red circle moves to the right on a navy background" in said
    assert "a large red circle moves to the right on a navy background" in said
    assert any(sentence.startswith("A red circle") for sentence in said)


def test_there_are_templates_enough_and_all_are_used():
    assert len(set(captions.ONE)) >= 12
    assert len(set(captions.TWO)) >= 6
    two = Scene((*RED_CIRCLE.things, Thing("star", "blue", "still", "small", 0.12)), "grey", 4)
    for made, templates in ((RED_CIRCLE, captions.ONE), (two, captions.TWO)):
        said = sentences(made)
        for template in templates:
            pattern = re.sub(r"{\w+}", ".+", template)
            assert any(re.fullmatch(pattern, sentence, re.IGNORECASE) for sentence in said), template


@pytest.mark.parametrize("index", range(60))
def test_a_caption_names_what_is_there_and_only_that(index):
    made = scene(1, index)
    said = captions.caption(made, np.random.default_rng(index)).lower().replace("gray", "grey")
    words = set(re.findall(r"\w+", said))
    assert words & set(SHAPES) == {thing.shape for thing in made.things}
    assert words & set(COLORS) == {thing.color for thing in made.things}
    assert words & set(BACKGROUNDS) == {made.background}
    sizes = {thing.size for thing in made.things}
    assert "small" not in words or "small" in sizes
    assert not words & {"large", "big"} or "large" in sizes
    assert not re.search(r"\d", said)  # the score is said by the annotation
    assert "{" not in said


@pytest.mark.parametrize("motion", [*HEADINGS, *captions.DOES])
def test_each_motion_has_several_wordings_that_are_its_own(motion):
    thing = Thing("square", "red", motion, "small", 0.12, heading=(0.0, 1.0))
    said = {captions._action(thing, np.random.default_rng(i)) for i in range(200)}
    assert len(said) >= 3
    for other in [*HEADINGS, *captions.DOES]:
        if other != motion:
            theirs = {
                captions._action(Thing("square", "red", other, "small", 0.12), np.random.default_rng(i))
                for i in range(200)
            }
            assert not said & theirs


def test_what_bounces_sideways_is_not_said_to_go_up():
    for heading, right, wrong in (((1.0, 0.0), "side to side", "up and down"), ((0.0, -1.0), "up and down", "side")):
        thing = Thing("square", "red", "bouncing", "small", 0.12, heading=heading)
        said = " ".join(sentences(Scene((thing,), "black", 1)))
        assert right in said
        assert wrong not in said


def test_the_vocabulary_is_all_that_is_said():
    said = captions.corpus(DRAWS, 0)
    assert set(re.findall(r"\w+", " ".join(said).lower())) == captions.vocabulary()
    assert captions.corpus(5, 0) == said[:5]
