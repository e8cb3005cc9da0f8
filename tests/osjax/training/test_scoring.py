"""What counts as right, and the figures that come of it."""

import dataclasses
import math

import numpy as np
import pytest

from osjax.training.reading import Reading, Seen
from osjax.training.scoring import match, psnr, score, summarise
from osjax.training.shapes import Scene, Thing

STAR = Thing("star", "blue", "up", "small", 0.12)
CIRCLE = Thing("circle", "red", "right", "large", 0.19)
ONE, TWO = Scene((CIRCLE,), "navy", 4), Scene((CIRCLE, STAR), "navy", 4)


def seen(thing, **changes):
    return dataclasses.replace(Seen(thing.shape, thing.color, thing.motion, thing.size, thing.radius, 4.1), **changes)


def test_all_right():
    result = score(TWO, Reading("navy", (seen(CIRCLE), seen(STAR))))
    assert result.complete
    assert (result.background, result.count, result.color, result.shape, result.motion) == (True,) * 5
    assert result.speed == 4.1


@pytest.mark.parametrize(
    ("changes", "wrong"), [({"color": "green"}, "color"), ({"shape": "star"}, "shape"), ({"motion": "left"}, "motion")]
)
def test_one_wrong_attribute_is_just_that(changes, wrong):
    result = score(TWO, Reading("navy", (seen(CIRCLE, **changes), seen(STAR))))
    assert not result.complete
    assert {name for name in ("color", "shape", "motion") if not getattr(result, name)} == {wrong}
    assert result.count
    assert result.background


def test_the_order_of_things_does_not_matter():
    pairs = match(TWO, Reading("navy", (seen(STAR), seen(CIRCLE))))
    assert [(thing.shape, found.shape) for thing, found in pairs] == [("circle", "circle"), ("star", "star")]


def test_attributes_are_not_gathered_from_several_things():
    mixed = (seen(CIRCLE, motion="up"), seen(CIRCLE, color="blue"))
    assert not score(ONE, Reading("navy", mixed)).complete


def test_too_few_things():
    result = score(TWO, Reading("navy", (seen(CIRCLE),)))
    assert not any((result.count, result.color, result.shape, result.motion))
    assert result.speed == 4.1
    nothing = score(ONE, Reading("navy", ()))
    assert nothing.background
    assert nothing.speed is None


def test_too_many_things_are_a_wrong_count_only():
    result = score(ONE, Reading("navy", (seen(STAR), seen(CIRCLE))))
    assert result.complete
    assert not result.count


def test_the_summary_keeps_one_and_two_things_apart():
    right, wrong = score(ONE, Reading("navy", (seen(CIRCLE),))), score(ONE, Reading("grey", (seen(STAR),)))
    both = score(TWO, Reading("navy", (seen(CIRCLE), seen(STAR))))
    half = score(TWO, Reading("navy", (seen(CIRCLE), seen(STAR, color="red"))))
    figures = summarise([ONE, ONE, TWO, TWO], [right, wrong, both, half])
    assert (figures.prompts, figures.background, figures.count) == (4, 75.0, 100.0)
    assert (figures.color, figures.shape, figures.motion, figures.all_three) == (50.0, 50.0, 50.0, 50.0)
    assert figures.two_right == 50.0


def test_speeds_are_ranked_over_what_moves_alone():
    def at(motion, asked, measured):
        made = Scene((dataclasses.replace(CIRCLE, motion=motion),), "navy", asked)
        return made, score(made, Reading("navy", (seen(CIRCLE, motion=motion, speed=measured),)))

    rising = [at("right", asked, 2.0 * asked) for asked in range(1, 8)]
    assert summarise(*zip(*rising, strict=True)).speed == 1.0
    assert summarise(*zip(*rising, at("still", 7, 0.0), strict=True)).speed == 1.0
    falling = [at("right", asked, -asked) for asked in range(1, 8)]
    assert summarise(*zip(*falling, strict=True)).speed == -1.0
    assert summarise(*zip(*rising[:1], strict=True)).speed is None


def test_nothing_asked_gives_no_figure():
    figures = summarise([], [])
    assert figures.prompts == 0
    assert set(dataclasses.asdict(figures).values()) == {0, None}


def test_psnr():
    black = np.zeros((2, 4, 4, 3), np.uint8)
    assert psnr(black, black + 255) == pytest.approx(0)
    assert psnr(black, black + 1) == pytest.approx(20 * math.log10(255))
    assert psnr(black, black) == math.inf
