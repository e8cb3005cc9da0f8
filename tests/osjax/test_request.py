"""Requests by name of their options; `test_pipeline.py` has those that cannot be drawn."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from osjax.errors import OsjaxError
from osjax.request import Request

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
