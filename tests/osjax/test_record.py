"""What provenance tells of the compiler."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from osjax.record import told_flags

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
