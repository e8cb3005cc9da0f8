"""One clip of a data set: what its file holds, and some of its frames at the size of a bucket."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
from collections.abc import Iterator

import av
import numpy as np

from osjax.errors import OsjaxError
from osjax.media import resize_clip_to_cover, to_uint8
from osjax.media.clips import decode, open_video, upright


class BrokenClip(OsjaxError):  # noqa: N818 - it is about the file
    """A file that is missing, no video, damaged or too short. `reason` says which, in a few words."""

    def __init__(self, path: str | os.PathLike[str], reason: str):
        super().__init__(f"{path} {reason}: mend or remove it")
        self.reason = reason


@dataclasses.dataclass(frozen=True)
class Measures:
    """Frames, their height and width in pixels as they are shown, and how many there are a second."""

    num_frames: int
    height: int
    width: int
    fps: float


@dataclasses.dataclass(frozen=True)
class Cut:
    """Every `interval`-th frame of a clip from number `start` on, `num_frames` in all."""

    start: int
    interval: int
    num_frames: int

    @property
    def span(self) -> int:
        """Frames of the clip from the first to the last that is taken, both counted."""
        return (self.num_frames - 1) * self.interval + 1


def measure(path: str | os.PathLike[str]) -> Measures:
    """Measures a video or a still by its header, its packets and its first frame. Raises BrokenClip."""
    with _naming(path):
        with contextlib.closing(decode(path)) as frames:
            first = next(frames, None)
            if first is None:
                raise BrokenClip(path, "holds no frame")
            height, width, _ = upright(first).shape
        with open_video(path) as container:
            stream = container.streams.video[0]
            rate = stream.average_rate or stream.guessed_rate
            # Some containers do not say how many frames they hold.
            count = stream.frames or sum(packet.size > 0 for packet in container.demux(stream))
    if not rate:
        raise BrokenClip(path, "tells no frame rate")
    return Measures(count, height, width, float(rate))


def read_cut(path: str | os.PathLike[str], cut: Cut, height: int, width: int) -> np.ndarray:
    """Frames of a file, resized to cover the size and cropped as reference clips are: uint8 [num_frames, H, W, 3].

    Raises BrokenClip for a file that cannot be read or ends before the cut does.
    """
    with _naming(path), contextlib.closing(decode(path)) as frames:
        taken = itertools.islice(frames, cut.start, cut.start + cut.span, cut.interval)
        # One by one: all the frames of a large file at their full size might not fit in memory.
        sized = [to_uint8(resize_clip_to_cover(upright(frame)[None], height, width)) for frame in taken]
    if len(sized) < cut.num_frames:
        raise BrokenClip(path, f"ends before frame {cut.start + cut.span}")
    return np.concatenate(sized)


@contextlib.contextmanager
def _naming(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turns what PyAV and the disk raise on files that cannot be used into a BrokenClip."""
    try:
        yield
    except BrokenClip:
        raise
    except FileNotFoundError as error:
        raise BrokenClip(path, "does not exist") from error
    except (av.FFmpegError, OSError, ValueError, OsjaxError) as error:
        raise BrokenClip(path, "is not a readable video") from error
