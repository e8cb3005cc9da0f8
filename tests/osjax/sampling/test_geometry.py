"""Sizes and token order: bounds that hold for every resolution, and pack/unpack on random grids."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from osjax.errors import OsjaxError
from osjax.sampling import geometry
from osjax.sampling.geometry import LatentGrid

RATIOS = st.sampled_from([*geometry.ASPECT_RATIOS, *(":".join(r.split(":")[::-1]) for r in geometry.ASPECT_RATIOS)])
# Either may replace the other's size by the transpose of its own, so little holds for one of them alone.
LISTED_BOTH_WAYS = ("16:9", "9:16")
MULTIPLES = st.sampled_from([16, 32])
GRIDS = st.builds(
    lambda t, rows, columns, patch: LatentGrid(t, rows * patch, columns * patch, patch),
    *[st.integers(1, 5)] * 3,
    st.integers(1, 3),
)


def ratio_of(name: str) -> float:
    wide, high = name.split(":")
    return float(wide) / float(high)


@pytest.mark.parametrize(
    ("resolution", "pixels"),
    [("256px", 256**2), ("768px", 768**2), ("360p", 640 * 360), ("720p", 1280 * 720), ("1px", 1)],
)
def test_resolution_pixels(resolution, pixels):
    assert geometry.resolution_pixels(resolution) == pixels


@pytest.mark.parametrize("resolution", ["", "px", "0px", "-256px", "256", "256PX", " 256px", "256px ", "2.5px", "hd"])
def test_unknown_resolution_names_the_known(resolution):
    with pytest.raises(OsjaxError, match=r"256px.*720p"):
        geometry.image_size(resolution, "16:9")


@pytest.mark.parametrize("ratio", ["16:10", "16/9", "", "1.0:1"])
def test_unknown_ratio_names_the_known(ratio):
    with pytest.raises(OsjaxError, match=r"16:9.*3:4"):
        geometry.image_size("256px", ratio)


@given(st.integers(128, 1200), RATIOS, MULTIPLES)
def test_image_size_fills_the_area_from_below(side, ratio, multiple):
    """At most the area asked for; one side is the exact one rounded down, the other fills what is left."""
    height, width = geometry.image_size(f"{side}px", ratio, multiple)
    assert height % multiple == width % multiple == 0
    assert height * width <= side * side
    assert any((own + multiple) * other > side * side for own, other in [(height, width), (width, height)])
    exact = {"width": side * math.sqrt(ratio_of(ratio)), "height": side / math.sqrt(ratio_of(ratio))}
    assert width == floor_to(multiple, exact["width"]) or height == floor_to(multiple, exact["height"])


def floor_to(multiple: int, value: float) -> int:
    return int(value // multiple) * multiple


@given(st.integers(128, 1200), st.integers(0, 400), RATIOS, MULTIPLES)
def test_image_size_grows_with_resolution(side, more, ratio, multiple):
    """Not strictly, as a side that reaches its next multiple can cost the other one: at most one row of tokens."""
    small = geometry.image_size(f"{side}px", ratio, multiple)
    large = geometry.image_size(f"{side + more}px", ratio, multiple)
    assert math.prod(large) > math.prod(small) - multiple * max(large)
    assert max(large) >= max(small) or min(large) >= min(small)


@given(st.integers(128, 1200), RATIOS, MULTIPLES)
def test_training_size_is_no_farther_from_the_area(side, ratio, multiple):
    try:
        training = geometry.image_size(f"{side}px", ratio, multiple, training=True)
    except OsjaxError:
        return  # dropped: another ratio has its size
    inference = geometry.image_size(f"{side}px", ratio, multiple)
    if ratio not in LISTED_BOTH_WAYS:
        assert abs(math.prod(training) - side**2) <= abs(math.prod(inference) - side**2)


@given(st.integers(128, 1200), RATIOS, MULTIPLES, st.booleans())
def test_reversed_ratio_is_the_transpose(side, ratio, multiple, training):
    reverse = ":".join(ratio.split(":")[::-1])
    try:
        size = geometry.image_size(f"{side}px", ratio, multiple, training)
    except OsjaxError:
        return
    if ratio != "1:1" and ratio not in LISTED_BOTH_WAYS:
        assert geometry.image_size(f"{side}px", reverse, multiple, training) == size[::-1]


def test_too_small_a_resolution_is_an_error():
    with pytest.raises(OsjaxError, match="larger resolution"):
        geometry.image_size("15px", "1:1")


@given(st.integers(1, 3000), st.integers(1, 3000))
def test_round_up_size(height, width):
    for given_side, side in zip((height, width), geometry.round_up_size(height, width), strict=True):
        assert side % 16 == 0
        assert given_side <= side < given_side + 16


@pytest.mark.parametrize("size", [(0, 16), (16, 0), (-5, 16)])
def test_empty_size_is_an_error(size):
    with pytest.raises(OsjaxError, match="at least 1 pixel"):
        geometry.round_up_size(*size)


@given(st.integers(-10, 300), st.integers(1, 5), st.booleans())
def test_accepted_frames_are_those_the_autoencoder_returns(frames, ratio, causal):
    """Encoding and decoding give ratio·(t − causal) + causal frames, or the one frame of an image."""
    t = geometry.latent_frames(frames, ratio, causal)
    returned = 1 if frames == 1 else ratio * (t - causal) + causal
    fits = 1 <= frames <= geometry.MAX_FRAMES and returned == frames
    if fits:
        geometry.check_frames(frames, ratio, causal)
        return
    with pytest.raises(OsjaxError) as error:
        geometry.check_frames(frames, ratio, causal)
    advice = int(str(error.value).rsplit(" ", 1)[1])
    geometry.check_frames(advice, ratio, causal)  # what the message tells the user to ask for is accepted
    accepted = [n for n in range(1, 130) if n == 1 or n % ratio == int(causal) % ratio]
    assert abs(advice - frames) == min(abs(n - frames) for n in accepted)


def test_the_grid_of_the_published_sizes():
    grid = geometry.latent_grid(192, 336, 129)
    assert grid == LatentGrid(t=33, h=24, w=42, patch=2)
    assert (grid.tokens_per_frame, grid.tokens) == (252, 8316)
    assert grid.noise_shape(16, batch=2) == (2, 33, 24, 42, 16)
    high_compression = geometry.latent_grid(576, 1024, 128, multiple=32, patch=1, causal=False)
    assert high_compression == LatentGrid(t=32, h=18, w=32, patch=1)


def test_a_grid_that_does_not_divide_is_refused():
    with pytest.raises(ValueError, match="does not divide"):
        LatentGrid(t=1, h=3, w=4, patch=2)


@given(GRIDS, st.integers(1, 2), st.integers(1, 3))
def test_unpack_undoes_pack(grid, batch, channels):
    shape = grid.noise_shape(channels, batch)
    z_bthwc = np.arange(math.prod(shape)).reshape(shape)
    x_bnc = geometry.pack(z_bthwc, grid.patch)
    assert x_bnc.shape == (batch, grid.tokens, channels * grid.patch**2)
    np.testing.assert_array_equal(geometry.unpack(x_bnc, grid), z_bthwc)


@given(GRIDS, st.integers(1, 3))
def test_a_token_stands_where_its_id_says(grid, channels):
    """Channel (c, row, column) of token n is the latent at id n times the patch plus (row, column)."""
    shape = grid.noise_shape(channels)
    z_bthwc = np.arange(math.prod(shape)).reshape(shape)
    x_bnc = geometry.pack(z_bthwc, grid.patch)
    ids_n3 = geometry.image_ids(grid)
    assert ids_n3.shape == (grid.tokens, 3)
    assert ids_n3.dtype == np.int32
    for n, (t, row, column) in enumerate(ids_n3):
        top, left = row * grid.patch, column * grid.patch
        block_hwc = z_bthwc[0, t, top : top + grid.patch, left : left + grid.patch]
        np.testing.assert_array_equal(x_bnc[0, n], np.moveaxis(block_hwc, -1, 0).ravel())


@pytest.mark.parametrize(
    ("ratio", "video", "size"),
    [
        ("16:9", (192, 336), (576, 1024)),
        ("9:16", (336, 192), (1024, 576)),
        (None, (32, 48), (624, 928)),  # rounded down, not to the closest area
        ("1.85:1", (192, 352), (560, 1056)),  # dropped from the training table
        (None, (16, 4096), (48, 12288)),
    ],
)
def test_a_picture_has_the_ratio_of_its_video(ratio, video, size):
    assert geometry.size_of_image("768px", ratio, video) == size
