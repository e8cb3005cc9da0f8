"""Dataclasses from flat options, and what type hints say about keys and words."""

import argparse
import dataclasses
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from osjax.cli.overrides import flatten
from osjax.cli.sections import build, describe, fit, hint_of, hints, word_parser


@dataclasses.dataclass(frozen=True)
class Inner:
    rate: float = 0.5
    pair: tuple[float, float] = (1.0, 2.0)
    weights: Mapping[str, float] = dataclasses.field(default_factory=lambda: {"a": 1.0})


@dataclasses.dataclass(frozen=True)
class Outer:
    count: int = 3
    name: str | None = None
    words: tuple[str, ...] = ()
    parts: Mapping[str, Mapping[str, Any]] = dataclasses.field(default_factory=dict)
    inner: Inner = Inner()


HINTS = {
    "count": int,
    "name": str | None,
    "words": tuple[str, ...],
    "inner.rate": float,
    "inner.pair": tuple[float, float],
    "inner.weights.b": float,
    "parts.x.depth": Any,
}


def test_hints_of_sections_and_mappings():
    assert {key: hint_of(Outer, key) for key in HINTS} == HINTS
    assert hints(Outer).keys() == {"count", "name", "words", "parts", "inner.rate", "inner.pair", "inner.weights"}
    for key in ("", "inner", "inner.weights", "inner.weights.b.c", "parts", "parts.x", "count.x", "other", "inner..x"):
        assert hint_of(Outer, key) is None, key


def test_what_is_left_out_keeps_its_default():
    assert build(Outer, {}) == Outer()
    assert build(Outer, {"inner.rate": 2.0, "name": "n"}) == Outer(name="n", inner=Inner(rate=2.0))


def test_entries_replace_a_mapping_and_come_in_the_order_of_their_names():
    built = build(Outer, {"inner.weights.c": 1.0, "inner.weights.b": 2.0, "parts.y.k": 1, "parts.x.k": (1, 2)})
    assert built.inner.weights == {"b": 2.0, "c": 1.0}
    assert list(built.inner.weights) == ["b", "c"]
    assert built.parts == {"x": {"k": (1, 2)}, "y": {"k": 1}}


names = st.text("xyz", min_size=1, max_size=2)
options = st.fixed_dictionaries(
    {},
    optional={
        "count": st.integers(),
        "name": st.none() | st.text(),
        "words": st.lists(st.text()).map(tuple),
        "inner.rate": st.floats(allow_nan=False),
        "inner.pair": st.tuples(st.floats(allow_nan=False), st.floats(allow_nan=False)),
    },
)


@given(options=options, weights=st.dictionaries(names, st.floats(allow_nan=False), min_size=1))
def test_flat_and_back(options, weights):
    built = build(Outer, options | {f"inner.weights.{name}": weight for name, weight in weights.items()})
    flat = flatten(dataclasses.asdict(built))
    assert build(Outer, flat) == built
    assert options.items() <= flat.items()


@pytest.mark.parametrize(
    ("value", "hint", "expected"),
    [
        (3, int, 3),
        (3, float, 3.0),
        (None, str | None, None),
        ("n", str | None, "n"),
        (["a", "b"], tuple[str, ...], ("a", "b")),
        ((1, 2.5), tuple[float, float], (1.0, 2.5)),
        ((), tuple[int, ...], ()),
        ({"any": 1}, Any, {"any": 1}),
    ],
)
def test_values_that_fit(value, hint, expected):
    found = fit(value, hint)
    assert (found, type(found)) == (expected, type(expected))


@pytest.mark.parametrize(
    ("value", "hint"),
    [
        (3.0, int),
        (True, int),
        (True, float),
        (1, bool),
        (None, str),
        ("ab", tuple[str, ...]),
        (("a", 1), tuple[str, ...]),
        ((1.0,), tuple[float, float]),
        ("3", float),
    ],
)
def test_values_that_do_not_fit(value, hint):
    with pytest.raises(TypeError):
        fit(value, hint)


@pytest.mark.parametrize(
    ("word", "hint", "expected"),
    [
        ("3", int, 3),
        ("None", str | None, None),
        ("None", str, "None"),
        ("a,b", tuple[str, ...], ("a", "b")),
        ("a cat, asleep;", tuple[str, ...], ("a cat, asleep",)),
        ("a cat, asleep; a dog", tuple[str, ...], ("a cat, asleep", "a dog")),
        ("", tuple[str, ...], ()),
        ("1,2", tuple[int, ...], (1, 2)),
        (".9,.99", tuple[float, float], (0.9, 0.99)),
        ("4", Any, 4),
        ("1e-3", Any, 1e-3),
        ("True", Any, True),
        ("None", Any, None),
        ("16,24,24", Any, (16, 24, 24)),
        ("t5-small", Any, "t5-small"),
    ],
)
def test_words(word, hint, expected):
    found = word_parser(hint)(word)
    assert (found, type(found)) == (expected, type(expected))


@pytest.mark.parametrize(
    ("word", "hint", "message"),
    [
        (".9", tuple[float, float], "'.9' has not 2 values"),
        ("1,x", tuple[int, ...], "'x' is not a whole number"),
        ("None", int, "'None' is not a whole number"),
    ],
)
def test_words_that_are_no_values(word, hint, message):
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        word_parser(hint)(word)


def test_hints_in_words():
    shown = {"int", "str", "str,...", "float", "float,float", "value"}
    assert {describe(hint) for hint in HINTS.values()} == shown
