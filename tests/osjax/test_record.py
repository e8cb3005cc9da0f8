"""What provenance tells of the compiler, and of what is approximate."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from osjax.parallel.mesh import make_mesh, parse_mesh
from osjax.record import Means, record, told_flags
from osjax.request import Request
from osjax.roles import VIDEO

words = st.text(st.characters(codec="ascii", categories=("L", "N"), include_characters="_./~\\\\$=-"), max_size=12)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ("", ""),
        ("--xla_gpu_autotune_level=2", "--xla_gpu_autotune_level=2"),
        ("  --a=1\t--b  --c=x,y ", "--a=1 --b --c=x,y"),
        ("--xla_dump_to=/home/me/dump --xla_gpu_ftz=true", "--xla_dump_to --xla_gpu_ftz=true"),
        (r"--a=C:\dump --b=~me --c=$HOME", "--a --b --c"),
        ("/home/me/flags.txt", ""),
    ],
)
def test_flags_are_told_without_places(flags: str, told: str) -> None:
    assert told_flags(flags) == told


@given(st.lists(st.tuples(st.from_regex(r"--[a-z_]{1,9}", fullmatch=True), words)))
def test_every_flag_keeps_its_name_and_no_place_is_told(flags: list[tuple[str, str]]) -> None:
    told = told_flags(" ".join(f"{name}={value}" for name, value in flags))
    assert [each.partition("=")[0] for each in told.split()] == [name for name, _ in flags]
    assert not set("/~$\\") & set(told)


@pytest.mark.parametrize(
    ("speed", "precision", "attention", "approximate"),
    [
        ("exact", "full", "pallas", False),
        ("fast", "full", "xla", True),
        ("exact", "int8", "cudnn", True),
        ("exact", "full", "fp8", True),
    ],
)
def test_whatever_is_approximate_is_told(speed, precision, attention, approximate):
    mesh = make_mesh(parse_mesh("data=1,seq=1"))
    means = Means("a", "b", (), mesh, "bf16", precision, attention, VIDEO)
    told = record(means, [Request("a", speed=speed)], 0, np.zeros((1, 2, 2, 3), np.uint8), 1, {})
    assert (told.approximate, told.attention) == (approximate, attention)
