"""Buckets: the few shapes that clips of any shape are cut to, so that a batch is one array.

A program is compiled for each shape, so they should be few. A bucket is a resolution, an aspect ratio and a number of
frames. A clip goes into the one that loses least of it.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
from collections.abc import Mapping, Sequence

from osjax.errors import OsjaxError
from osjax.sampling.geometry import image_size, resolution_pixels
from osjax.training.clips import Cut
from osjax.training.table import Clip

# A clip with this share of a resolution's pixels is enlarged to it; with fewer it would teach blur. The reference's.
ENOUGH_PIXELS = 0.8


@dataclasses.dataclass(frozen=True)
class Bucket:
    """Clips of num_frames frames of height × width pixels; the names are those of the config."""

    resolution: str
    aspect_ratio: str
    num_frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.resolution} {self.aspect_ratio} of {self.num_frames} frames"


@dataclasses.dataclass(frozen=True)
class Sorted:
    """Clips, by their numbers: those of each bucket (none of which is empty), and those that fit into none."""

    members: Mapping[Bucket, tuple[int, ...]]
    too_short: tuple[int, ...]
    too_small: tuple[int, ...]


def make_buckets(
    resolutions: Sequence[str], aspect_ratios: Sequence[str], num_frames: Sequence[int], multiple: int = 16
) -> tuple[Bucket, ...]:
    """Every combination; sizes are those that videos are drawn in (`image_size`), multiples of `multiple` pixels.

    Raises OsjaxError for unknown names, for frame counts below 1, and if there is no combination.
    """
    if any(count < 1 for count in num_frames):
        raise OsjaxError(f"data.num_frames holds {min(num_frames)}: give numbers of at least 1")
    buckets = tuple(
        Bucket(resolution, ratio, count, *image_size(resolution, ratio, multiple))
        for resolution, ratio, count in itertools.product(resolutions, aspect_ratios, num_frames)
    )
    if not buckets:
        raise OsjaxError("there are no buckets: give data.resolution, data.aspect_ratios and data.num_frames")
    return buckets


def frame_interval(clip_fps: float, fps: float) -> int:
    """Every how many frames of a clip one is taken to come close to `fps` frames a second; at least 1.

    Whole numbers keep motion even, where taking the frames nearest in time would make it stutter. The caption says what
    the rate has become (`clip_fps` over the interval).
    """
    return max(1, round(clip_fps / fps))


def cut_of(clip: Clip, bucket: Bucket, fps: float, turn: int) -> Cut:
    """The frames that a clip gives its bucket when its `turn` comes: a long clip gives piece after piece, then again.

    The pieces do not overlap, so that few of them hold all that there is, and each is found again in a cache.
    """
    cut = _first_cut(clip, bucket, fps)
    starts = range(0, clip.num_frames - cut.span + 1, cut.num_frames * cut.interval)
    return dataclasses.replace(cut, start=starts[turn % len(starts)])


def sort_clips(clips: Sequence[Clip], buckets: Sequence[Bucket], fps: float) -> Sorted:
    """Finds each clip the bucket it fits best.

    Of those it is long enough for at `fps` frames a second, and has pixels enough for, that is the one of the highest
    resolution, then of the most frames, then of the nearest aspect ratio.
    """
    members = collections.defaultdict(list)
    too_short, too_small = [], []
    for index, clip in enumerate(clips):
        long_enough = [bucket for bucket in buckets if _first_cut(clip, bucket, fps).span <= clip.num_frames]
        fitting = [bucket for bucket in long_enough if _fills(clip, bucket)]
        if fitting:
            members[max(fitting, key=lambda bucket, clip=clip: _likeness(clip, bucket))].append(index)
        elif long_enough:
            too_small.append(index)
        else:
            too_short.append(index)
    ordered = {bucket: tuple(members[bucket]) for bucket in buckets if bucket in members}
    return Sorted(ordered, tuple(too_short), tuple(too_small))


def _first_cut(clip: Clip, bucket: Bucket, fps: float) -> Cut:
    return Cut(0, frame_interval(clip.fps, fps), bucket.num_frames)


def _fills(clip: Clip, bucket: Bucket) -> bool:
    return clip.height * clip.width >= ENOUGH_PIXELS * resolution_pixels(bucket.resolution)


def _likeness(clip: Clip, bucket: Bucket) -> tuple[int, int, float]:
    """Larger is better. Ratios are compared by their logarithms: twice as wide is as far away as twice as high."""
    stretch = (clip.width / clip.height) / (bucket.width / bucket.height)
    return resolution_pixels(bucket.resolution), bucket.num_frames, -abs(math.log(stretch))
