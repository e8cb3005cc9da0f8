"""Requests by name of their options; `test_pipeline.py` has those that cannot be drawn."""

import dataclasses
import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from osjax.errors import OsjaxError
from osjax.request import MAX_SEED, Request, continuation_seed

NAMES = {field.name for field in dataclasses.fields(Request)}


def test_what_is_not_named_keeps_its_default():
    assert Request.of({"prompt": "a cat", "seed": 3}) == Request(prompt="a cat", seed=3)


@given(st.sets(st.text(min_size=1).filter(lambda name: name not in NAMES), min_size=1, max_size=3))
def test_unknown_names_are_all_told(names):
    with pytest.raises(OsjaxError) as refused:
        Request.of({"prompt": "a cat"} | dict.fromkeys(names, 1))
    assert all(name in str(refused.value) for name in names)


def test_values_are_checked_too():
    with pytest.raises(OsjaxError, match="num_steps"):
        Request.of({"prompt": "a cat", "num_steps": 0})


def test_requests_that_go_together_differ_in_what_is_said_and_in_seeds():
    one = Request("a cat")
    assert one.shared() == Request("a dog", negative_prompt="blur", refs=("a",), seed=1, motion_score="7").shared()
    assert len({one.shared(), Request("a cat", num_steps=3).shared(), Request("a cat", extend=1).shared()}) == 3


@given(st.integers(0, MAX_SEED - 1), st.integers(1, 50))
def test_continuations_have_seeds_of_their_own(seed, number):
    assert 0 <= continuation_seed(seed, number) <= MAX_SEED
    others = {continuation_seed(seed, number + 1), continuation_seed(seed + 1, number), seed, seed + 1}
    assert continuation_seed(seed, number) not in others


def test_the_seed_of_a_continuation_stays_what_it_is():
    assert continuation_seed(42, 1) == int(hashlib.sha256(b"42/1").hexdigest()[:8], 16)
