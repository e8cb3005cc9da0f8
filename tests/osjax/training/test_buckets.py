"""Buckets: every clip lands where it should, or is left out for a reason that holds."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from osjax.errors import OsjaxError
from osjax.sampling.geometry import image_size, resolution_pixels
from osjax.training.buckets import Bucket, cut_of, frame_interval, make_buckets, sort_clips
from osjax.training.table import Clip

RESOLUTIONS = ("96px", "256px", "480p")
RATIOS = ("2:1", "16:9", "4:3", "1:1", "9:16")
FRAMES = (1, 5, 33, 65, 129)

CLIPS = st.builds(
    Clip,
    path=st.just("a.mp4"),
    text=st.just("a cat"),
    num_frames=st.integers(1, 400),
    height=st.integers(1, 1200),
    width=st.integers(1, 1200),
    fps=st.sampled_from((8.0, 12.5, 23.976, 24.0, 25.0, 29.97, 30.0, 50.0, 60.0, 120.0)),
)


def subsets(values):
    return st.lists(st.sampled_from(values), min_size=1, max_size=4, unique=True)


BUCKETS = st.builds(make_buckets, subsets(RESOLUTIONS), subsets(RATIOS), subsets(FRAMES))


def clip(num_frames=33, height=96, width=96, fps=24.0):
    return Clip("a.mp4", "a cat", num_frames, height, width, fps)


def bucket_of(one, buckets, fps=24):
    (bucket,) = sort_clips([one], buckets, fps).members
    return bucket


def long_enough(one, bucket, fps):
    """By hand: so many frames can be taken at that distance."""
    return len(range(0, one.num_frames, frame_interval(one.fps, fps))) >= bucket.num_frames


def large_enough(one, bucket):
    return one.height * one.width >= 0.8 * resolution_pixels(bucket.resolution)


@given(clips=st.lists(CLIPS, max_size=20), buckets=BUCKETS, fps=st.sampled_from((12, 24)))
def test_every_clip_is_in_the_best_bucket_that_it_fills_or_named_as_left_out(clips, buckets, fps):
    found = sort_clips(clips, buckets, fps)
    everywhere = [*found.too_short, *found.too_small, *(index for some in found.members.values() for index in some)]
    assert sorted(everywhere) == list(range(len(clips)))
    for bucket, indices in found.members.items():
        assert indices == tuple(sorted(indices)) != ()
        for one in (clips[index] for index in indices):
            assert long_enough(one, bucket, fps)
            assert large_enough(one, bucket)
            better = [b for b in buckets if long_enough(one, b, fps) and large_enough(one, b) and wins(one, b, bucket)]
            assert not better
    for index in found.too_short:
        assert not any(long_enough(clips[index], bucket, fps) for bucket in buckets)
    for index in found.too_small:
        assert not any(long_enough(clips[index], b, fps) and large_enough(clips[index], b) for b in buckets)


def wins(one, a, b):
    """Whether `a` should be preferred: more pixels, then more frames, then less to crop."""
    pixels_a, pixels_b = resolution_pixels(a.resolution), resolution_pixels(b.resolution)
    if pixels_a != pixels_b:
        return pixels_a > pixels_b
    if a.num_frames != b.num_frames:
        return a.num_frames > b.num_frames
    return stretch(one, a) < stretch(one, b) - 1e-12


def stretch(one, bucket):
    """By which factor the ratios differ, whichever is larger."""
    factor = one.width * bucket.height / (one.height * bucket.width)
    return max(factor, 1 / factor)


@given(one=CLIPS, buckets=BUCKETS, turns=st.lists(st.integers(0, 1000), min_size=1, max_size=5))
def test_every_piece_lies_within_its_clip_and_they_do_not_overlap(one, buckets, turns):
    for bucket in sort_clips([one], buckets, 24).members:
        cuts = {cut_of(one, bucket, 24, turn) for turn in turns}
        starts = sorted(cut.start for cut in cuts)
        for cut in cuts:
            assert cut.num_frames == bucket.num_frames
            assert cut.start + cut.span <= one.num_frames
        assert all(b - a >= cut.span for a, b in itertools.pairwise(starts))


def test_a_long_clip_gives_piece_after_piece_and_begins_again():
    (bucket,) = make_buckets(["96px"], ["1:1"], [33])
    assert [cut_of(clip(100), bucket, 24, turn).start for turn in range(5)] == [0, 33, 66, 0, 33]
    assert [cut_of(clip(100, fps=48), bucket, 24, turn).start for turn in range(3)] == [0, 0, 0]
    assert [cut_of(clip(131, fps=48), bucket, 24, turn).start for turn in range(3)] == [0, 66, 0]


@pytest.mark.parametrize(
    ("clip_fps", "fps", "interval"),
    [
        (24, 24, 1),
        (23.976, 24, 1),
        (25, 24, 1),
        (30, 24, 1),
        (48, 24, 2),
        (50, 24, 2),
        (120, 24, 5),
        (8, 24, 1),
        (30, 12, 2),
    ],
)
def test_frames_are_dropped_evenly_to_come_close_to_a_rate(clip_fps, fps, interval):
    assert frame_interval(clip_fps, fps) == interval


def test_sizes_are_those_that_videos_are_drawn_in():
    buckets = make_buckets(["96px", "256px"], ["16:9", "1:1"], [33, 129], 32)
    assert len(buckets) == len(set(buckets)) == 8
    for bucket in buckets:
        assert (bucket.height, bucket.width) == image_size(bucket.resolution, bucket.aspect_ratio, 32)
    assert str(buckets[0]) == "96px 16:9 of 33 frames"


def test_resolution_comes_before_length_and_length_before_ratio():
    buckets = make_buckets(["96px", "256px"], ["16:9", "9:16"], [5, 33])
    assert bucket_of(clip(40, 288, 512), buckets) == Bucket("256px", "16:9", 33, 192, 336)
    assert bucket_of(clip(10, 288, 512), buckets) == Bucket("256px", "16:9", 5, 192, 336)
    assert bucket_of(clip(40, 128, 72), buckets) == Bucket("96px", "9:16", 33, 128, 64)


def test_a_little_enlarging_is_allowed():
    buckets = make_buckets(["96px"], ["1:1"], [5])
    side = math.ceil(96 * math.sqrt(0.8))
    assert sort_clips([clip(5, side, side), clip(5, side - 1, side - 1)], buckets, 24).too_small == (1,)


def test_a_clip_shorter_than_every_bucket_is_left_out():
    buckets = make_buckets(["96px"], ["1:1"], [5, 33])
    clips = [clip(4), clip(5), clip(32), clip(33), clip(8, fps=48), clip(9, fps=48)]
    found = sort_clips(clips, buckets, 24)
    assert found.too_short == (0, 4)
    assert found.members == {buckets[0]: (1, 2, 5), buckets[1]: (3,)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([], ["1:1"], [33]), "there are no buckets: give data.resolution"),
        ((["256px"], [], [33]), "there are no buckets"),
        ((["256px"], ["1:1"], []), "there are no buckets"),
        ((["256px"], ["1:1"], [33, 0]), "data.num_frames holds 0: give numbers of at least 1"),
        ((["256"], ["1:1"], [33]), "unknown resolution '256'"),
        ((["256px"], ["7:1"], [33]), "no aspect ratio '7:1' at 256px"),
    ],
)
def test_buckets_that_cannot_be(arguments, message):
    with pytest.raises(OsjaxError, match=message):
        make_buckets(*arguments)
