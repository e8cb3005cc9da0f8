"""Prompt annotation: worked examples and what holds for any prompt."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from osjax.text.annotate import annotate, has_fps, with_fps, with_motion_score, with_period

RATES = st.integers(1, 240)


@pytest.mark.parametrize(
    ("prompt", "fps", "score", "expected"),
    [
        ("a cat", 24, 4, "a cat. 24 FPS. 4 motion score."),
        ("  a cat.\n", 16, "5", "a cat. 16 FPS. 5 motion score."),
        ("rain 30 FPS", 24, 4, "rain 30 FPS. 4 motion score."),
        ("a film at 24 FPS. It rains", 24, 4, "a film at 24 FPS. It rains. 24 FPS. 4 motion score."),
        ("why?", 24, 4, "why?. 24 FPS. 4 motion score."),
        ("at 24 fps.", 24, 4, "at 24 fps. 24 FPS. 4 motion score."),
    ],
)
def test_examples(prompt, fps, score, expected):
    assert annotate(prompt, fps, score) == expected


@given(st.text())
def test_period_is_added_once(text):
    sentence = with_period(text)
    assert sentence.endswith(".")
    assert sentence == sentence.strip() == with_period(sentence)
    assert sentence.removesuffix(".") in text.strip()


@given(st.text(), RATES, RATES)
def test_the_first_fps_stays(text, first, second):
    once = with_fps(text, first)
    assert has_fps(once)
    assert with_fps(once, second) == once


@given(st.text(), RATES, st.integers(1, 10))
def test_annotation_only_appends(text, fps, score):
    annotated = annotate(text, fps, score)
    assert annotated == with_motion_score(with_fps(text, fps), score)
    assert annotated.startswith(with_period(text))
    assert annotated.endswith(f" {score} motion score.")
