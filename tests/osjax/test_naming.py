"""Output names beyond the golden ones: what cannot name a file is refused."""

import pytest

from osjax.errors import OsjaxError
from osjax.naming import output_stem


def test_each_sort_of_name():
    assert output_stem(fallback="cats", index=12) == "cats_0012"
    assert output_stem(fallback="cats", index=12345, sample=1, prefix="v1_") == "v1_cats_12345_1"
    assert output_stem("clip", prefix="v1_") == "v1_clip"
    assert output_stem("clip", sample=3) == "clip_3"
    assert output_stem(prompt="...a cat.", sample=2) == "a cat-2"


def test_a_prompt_with_slashes_stays_one_file():
    assert output_stem(prompt="black/white, ../up") == "black_white, .._up-0"


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/etc/passwd", "nul\0"])
def test_what_is_no_file_name_is_refused(name):
    with pytest.raises(OsjaxError, match="without slashes"):
        output_stem(name)


def test_length_is_counted_in_bytes():
    assert len(output_stem("é" * 120).encode()) == 240
    with pytest.raises(OsjaxError, match="shorter"):
        output_stem("é" * 121)
