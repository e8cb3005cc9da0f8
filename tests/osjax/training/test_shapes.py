"""Scenes keep their promises: on the stage, apart, repeatable, balanced; what is held out never shows."""

import dataclasses
import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from osjax.errors import OsjaxError
from osjax.training import shapes
from osjax.training.shapes import BACKGROUNDS, COLORS, HEADINGS, MOTIONS, SCORES, SHAPES, Thing, trajectory

INDICES = st.integers(0, 2**31)
MOMENTS = np.linspace(0, 1, 129)


@settings(max_examples=300, deadline=None)
@given(index=INDICES, held_out=st.booleans())
def test_things_stay_on_the_stage_and_apart(index, held_out):
    made = shapes.scene(0, index, held_out=held_out)
    paths = [trajectory(thing, made.score, MOMENTS) for thing in made.things]
    for centre, radius, _ in paths:
        assert (centre - radius[:, None]).min() >= -1e-9
        assert (centre + radius[:, None]).max() <= 1 + 1e-9
    for (a, radius_a, _), (b, radius_b, _) in itertools.combinations(paths, 2):
        # Placing looks at 65 moments; between two of them the fastest pair comes closer by less than this.
        assert (np.linalg.norm(a - b, axis=1) - radius_a - radius_b).min() > shapes.GAP - 0.02


@settings(max_examples=300, deadline=None)
@given(index=INDICES, held_out=st.booleans())
def test_all_of_a_scene_is_held_out_or_none(index, held_out):
    things = shapes.scene(0, index, held_out=held_out).things
    assert all(shapes.is_held_out(each.color, each.shape, each.motion) == held_out for each in things)
    assert not any((each.shape, each.motion) == ("circle", "spinning") for each in things)
    assert len({(each.color, each.shape) for each in things}) == len(things)


def test_a_scene_is_known_by_its_number_alone():
    backwards = [shapes.scene(3, i) for i in reversed(range(20))][::-1]
    assert backwards == [shapes.scene(3, i) for i in range(20)]
    assert len(set(backwards)) == 20
    assert shapes.scene(4, 0) != shapes.scene(3, 0)


def test_a_tenth_is_held_out_and_no_part_of_a_triple_goes_short():
    held_out, trained = shapes.triples(True), shapes.triples(False)
    assert len(held_out) + len(trained) == len(COLORS) * len(SHAPES) * len(MOTIONS) - len(COLORS)
    assert 0.08 < len(held_out) / len(held_out + trained) < 0.12
    assert ("red", "circle", "right") in trained  # the example of the documentation
    for part, names in enumerate((COLORS, SHAPES, MOTIONS)):
        seen, missing = Counter(each[part] for each in trained), Counter(each[part] for each in held_out)
        for name in names:
            assert 0 < missing[name] < 0.2 * (seen[name] + missing[name]), name


@pytest.mark.parametrize("share", [0.0, 0.6, 1.0])
def test_as_many_scenes_have_two_things_as_asked_for(share):
    """Of 400; four deviations are 0.1. Only how many things there are depends on the share."""
    scenes = [shapes.scene(0, i, two_things=share) for i in range(400)]
    assert np.mean([len(each.things) == 2 for each in scenes]) == pytest.approx(share, abs=0.1 if share % 1 else 0)
    usual = [shapes.scene(0, i) for i in range(400)]
    same = [one for one, other in zip(scenes, usual, strict=True) if len(one.things) == len(other.things)]
    assert same
    assert all(each in usual for each in same)


def test_everything_is_drawn_about_as_often_as_it_should_be():
    scenes = [shapes.scene(0, i) for i in range(2000)]
    assert 0.25 < np.mean([len(each.things) == 2 for each in scenes]) < 0.31
    things = [thing for each in scenes for thing in each.things]
    for values, names, of in (
        ([each.score for each in scenes], SCORES, scenes),
        ([each.background for each in scenes], BACKGROUNDS, scenes),
        ([each.shape for each in things], SHAPES, things),
        ([each.color for each in things], COLORS, things),
        ([each.motion for each in things], MOTIONS, things),
        ([each.size for each in things], shapes.RADII, things),
    ):
        counts = Counter(values)
        assert set(counts) == set(names)
        assert min(counts.values()) > 0.6 * len(of) / len(names)
        assert max(counts.values()) < 1.4 * len(of) / len(names)


def test_colours_are_well_apart():
    palette = [*COLORS.values(), *BACKGROUNDS.values()]
    for a, b in itertools.combinations(palette, 2):
        assert np.linalg.norm(np.subtract(a, b)) > 90
    for a, b in itertools.product(COLORS.values(), BACKGROUNDS.values()):
        assert np.linalg.norm(np.subtract(a, b)) > 120


@pytest.mark.parametrize("law", [shapes.travel, shapes.bounce_travel, shapes.turn, shapes.growth])
def test_speed_grows_in_equal_steps_with_the_score(law):
    steps = np.diff([law(score) for score in SCORES])
    assert steps[0] > 0
    np.testing.assert_allclose(steps, steps[0])


@pytest.mark.parametrize("score", SCORES)
def test_what_moves_does_just_what_its_name_says(score):
    ends = np.array([0.0, 1.0])
    for motion in MOTIONS:
        thing = Thing("square", "red", motion, "small", 0.1, heading=HEADINGS.get(motion, (0.0, 0.0)), band=0.5)
        if motion == "bouncing":
            continue
        centre, radius, angle = trajectory(thing, score, ends)
        way, growth, turn = centre[1] - centre[0], radius[1] / radius[0], angle[1] - angle[0]
        np.testing.assert_allclose(way, shapes.travel(score) * np.array(HEADINGS.get(motion, (0, 0))), atol=1e-12)
        np.testing.assert_allclose(turn, shapes.turn(score) * (motion == "spinning"))
        factor = {"growing": shapes.growth(score), "shrinking": 1 / shapes.growth(score)}.get(motion, 1)
        np.testing.assert_allclose(growth, factor)
        np.testing.assert_allclose(np.sqrt(radius.prod()), thing.radius)  # the middle of the clip


@settings(max_examples=200, deadline=None)
@given(index=INDICES, score=st.sampled_from(SCORES))
def test_what_bounces_turns_around_within_the_clip_and_keeps_its_speed(index, score):
    rng = np.random.default_rng(index)
    thing = shapes._sample_thing(rng, score, held_out=False)
    while thing.motion != "bouncing":
        thing = shapes._sample_thing(rng, score, held_out=False)
    centre, _, _ = trajectory(thing, score, np.linspace(0, 1, 2001))
    along = (centre - centre[0]) @ np.array(thing.heading)
    assert np.ptp(along) <= thing.band + 1e-9
    assert along[1] > 0  # sets out along its heading
    there, back = along - np.minimum.accumulate(along), np.maximum.accumulate(along) - along
    assert min(there.max(), back.max()) > 0.0899  # 0.3 of the way of score 1, but for the sampling of moments
    speed = np.abs(np.diff(along)) * 2000
    assert np.mean(np.abs(speed / shapes.bounce_travel(score) - 1) < 1e-6) > 0.99  # all but where it turns


def test_a_clip_too_long_for_the_stage_is_refused():
    shapes.check_length(33, 24)
    shapes.check_length(17, 12)
    with pytest.raises(OsjaxError, match="use at most 33"):
        shapes.check_length(37, 24)


def test_scenes_are_values():
    made = shapes.scene(0, 0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        made.score = 3
    assert hash(made) == hash(shapes.scene(0, 0))
