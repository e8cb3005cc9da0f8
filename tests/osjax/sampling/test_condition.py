"""Conditions: the table's numbers, masks, what is cut from references and what is put back."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from osjax.errors import OsjaxError
from osjax.sampling import condition
from osjax.sampling.condition import CONDITION_KINDS, condition_kind

KINDS = st.sampled_from(list(CONDITION_KINDS.values()))
WITH_REFERENCES = st.sampled_from([kind for kind in CONDITION_KINDS.values() if kind.references])


def latents(frames: int, start: float = 1.0, height: int = 1, width: int = 2, channels: int = 3) -> np.ndarray:
    """thwc latents, all different and none zero."""
    size = frames * height * width * channels
    return np.arange(start, start + size, dtype=np.float32).reshape(frames, height, width, channels)


@pytest.mark.parametrize(
    ("name", "references", "causal", "frames", "given_latents", "padding"),
    [
        ("t2v", 0, False, 1, 1, (0, 0)),
        ("i2v_head", 1, True, 1, 1, (0, 0)),
        ("i2v_head", 1, False, 1, 1, (3, 0)),
        ("i2v_tail", 1, False, 1, 1, (0, 3)),
        ("i2v_loop", 2, True, 1, 1, (0, 0)),
        ("i2v_loop", 2, False, 1, 1, (3, 3)),
        ("v2v_head", 1, True, 33, 9, (0, 0)),
        ("v2v_tail", 1, False, 32, 8, (0, 0)),
        ("v2v_head_easy", 1, True, 65, 17, (0, 0)),
        ("v2v_tail_easy", 1, False, 64, 16, (0, 0)),
    ],
)
def test_numbers(name, references, causal, frames, given_latents, padding):
    kind = condition_kind(name)
    assert kind.references == references
    assert kind.reference_frames(causal) == frames
    assert kind.latents(causal) == given_latents
    assert kind.padding(causal) == padding


@pytest.mark.parametrize(
    ("name", "nearest"), [("i2v-head", "i2v_head"), ("v2v_heads", "v2v_head"), ("T2V", "t2v"), ("loop", "i2v_loop")]
)
def test_unknown_kind_names_the_nearest(name, nearest):
    with pytest.raises(OsjaxError, match=rf"did you mean {nearest}\?"):
        condition_kind(name)


def test_a_kind_like_no_other_names_them_all():
    with pytest.raises(OsjaxError) as error:
        condition_kind("?")
    assert all(name in str(error.value) for name in CONDITION_KINDS)


def test_the_table_cannot_be_changed():
    with pytest.raises(TypeError):
        CONDITION_KINDS["i2v_mid"] = CONDITION_KINDS["i2v_head"]


@given(KINDS, st.integers(17, 40), st.booleans())
def test_masks_cover_the_ends(kind, frames, causal):
    mask_t = condition.condition_masks(kind, frames, causal)
    count = kind.latents(causal)
    expected = [1.0 if (kind.head and i < count) or (kind.tail and i >= frames - count) else 0.0 for i in range(frames)]
    assert mask_t.tolist() == expected


@given(KINDS, st.integers(2, 16), st.booleans())
def test_a_video_shorter_than_its_condition_is_an_error(kind, frames, causal):
    if not kind.references or kind.latents(causal) <= frames:
        assert condition.condition_masks(kind, frames, causal).sum() <= 2 * kind.latents(causal)
        return
    with pytest.raises(OsjaxError, match="ask for more frames"):
        condition.condition_masks(kind, frames, causal)


@given(KINDS, st.booleans())
def test_a_single_frame_ignores_references(kind, causal):
    sample = [latents(kind.latents(causal))] * kind.references
    mask, masked_ref = condition.condition((1, 1, 1, 2, 3), [sample], kind, causal)
    assert not np.any(mask)
    assert not np.any(masked_ref)


def test_head_takes_first_latents_and_tail_last():
    first, last = latents(3), latents(3, start=1000)
    mask, masked_ref = condition.condition((1, 4, 1, 2, 3), [[first, last]], condition_kind("i2v_loop"))
    assert mask.shape == (1, 4, 1, 2, 1)
    np.testing.assert_array_equal(masked_ref[0, 0], first[0])
    np.testing.assert_array_equal(masked_ref[0, -1], last[-1])
    assert not np.any(masked_ref[0, 1:-1])


def test_a_sample_without_reference_is_text_to_video():
    mask, masked_ref = condition.condition((2, 4, 1, 2, 3), [[], [latents(1)]], condition_kind("i2v_head"))
    assert not np.any(mask[0])
    assert not np.any(masked_ref[0])
    assert np.all(mask[1, 0] == 1)


@given(WITH_REFERENCES, st.booleans())
def test_too_short_a_reference_is_an_error(kind, causal):
    sample = [latents(kind.latents(causal) - 1)] * kind.references
    with pytest.raises(OsjaxError, match="longer clip"):
        condition.condition((1, 20, 1, 2, 3), [sample], kind, causal)


def test_references_are_counted_per_sample():
    with pytest.raises(ValueError, match="batch of 2"):
        condition.condition((2, 4, 1, 2, 3), [[latents(1)]], condition_kind("i2v_head"))


@given(WITH_REFERENCES)
def test_the_head_is_the_first_reference_and_the_tail_the_last(kind):
    assigned = kind.assign(["first", "second"][: kind.references])
    expected = [("first", False)] * kind.head + [("second" if kind.head else "first", True)] * kind.tail
    assert assigned == expected


def test_one_image_can_be_both_ends_of_a_loop():
    assert condition_kind("i2v_loop").assign(["image"]) == [("image", False), ("image", True)]


@pytest.mark.parametrize(
    ("name", "count"), [("t2v", 1), ("i2v_head", 0), ("i2v_head", 2), ("v2v_tail", 2), ("i2v_loop", 3)]
)
def test_a_wrong_number_of_references_is_an_error(name, count):
    with pytest.raises(OsjaxError, match="give that many"):
        condition_kind(name).assign(["image"] * count)


@given(KINDS, st.booleans())
def test_given_latents_are_put_back_in_every_sample(kind, causal):
    """For image kinds only; a sample without reference, and every latent that is not given, stays as it was drawn."""
    z = -latents(3 * 20).reshape(3, 20, 1, 2, 3)
    sample = [latents(kind.latents(causal), start=500.0 * (i + 1)) for i in range(kind.references)]
    mask, masked_ref = condition.condition(z.shape, [sample, [], sample], kind, causal)
    restored = condition.replace_references(z, mask, masked_ref, kind)
    expected = z.copy()
    for row in (0, 2) if kind.is_image else ():
        if kind.head:
            expected[row, 0] = sample[0][0]
        if kind.tail:
            expected[row, -1] = sample[-1][0]
    np.testing.assert_array_equal(restored, expected)
