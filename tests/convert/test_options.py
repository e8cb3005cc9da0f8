"""Upstream's options: those known by name, JSON's lists as tuples, the others refused."""

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convert.options import fields_of
from osjax.errors import OsjaxError


@dataclasses.dataclass(frozen=True)
class Config:
    widths: tuple[int, ...] = (1, 2)
    depth: int = 3


def test_fields_are_taken_and_lists_become_tuples():
    options = {"widths": [4, 5], "depth": 6, "path": ["x"]}
    assert fields_of(options, Config, unused={"path"}, model="toy") == {"widths": (4, 5), "depth": 6}
    assert fields_of({}, Config, unused=(), model="toy") == {}


@given(st.sets(st.text(min_size=1).filter(lambda name: name not in ("widths", "depth")), min_size=1, max_size=3))
def test_unknown_options_are_all_named(names):
    with pytest.raises(OsjaxError, match="unknown toy options") as refused:
        fields_of({"depth": 1} | dict.fromkeys(names, 1), Config, unused=(), model="toy")
    assert ", ".join(sorted(names)) in str(refused.value)
