"""Reference clips: the first or last frames of a video file, upright, resized to cover the video's size and cropped."""

from __future__ import annotations

import collections
import os
from collections.abc import Iterator
from pathlib import Path

import av
import numpy as np

from osjax.errors import OsjaxError
from osjax.media.images import cover, read_image, to_model

VIDEO_SUFFIXES = frozenset({".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".gif"})


def read_reference(
    path: str | os.PathLike[str], frames: int, height: int, width: int, *, from_end: bool = False
) -> np.ndarray:
    """Reads what a condition asks for, float32 [frames, height, width, 3] in [-1, 1], from an image or a video file.

    Where one frame is asked for, a video gives its first, or its last `from_end`; the reference does the same.
    Raises OsjaxError as `read_image` and `read_clip` do, and for an image where more than one frame is needed.
    """
    if Path(path).suffix.lower() in VIDEO_SUFFIXES:
        return read_clip(path, frames, height, width, from_end=from_end)
    if frames > 1:
        raise OsjaxError(f"{path} is not a video and {frames} frames are needed: give a {_listed(VIDEO_SUFFIXES)} file")
    return read_image(path, height, width)


def read_clip(
    path: str | os.PathLike[str], frames: int, height: int, width: int, *, from_end: bool = False
) -> np.ndarray:
    """Reads the first (or last, `from_end`) frames of a video: float32 [frames, height, width, 3] in [-1, 1].

    Frames are taken as they are stored, whatever the file's frame rate. Raises OsjaxError if the file is missing, no
    video, damaged, or shorter than `frames`.
    """
    if not Path(path).is_file():
        raise OsjaxError(f"no such reference video: {path}: check the path")
    kept: collections.deque[av.VideoFrame] = collections.deque(maxlen=frames)
    try:
        for frame in decode(path):
            kept.append(frame)
            if len(kept) == frames and not from_end:
                break
    except (av.FFmpegError, OSError) as error:
        raise OsjaxError(f"{path} is not a readable video: give a {_listed(VIDEO_SUFFIXES)} file") from error
    if len(kept) < frames:
        raise OsjaxError(f"{path} has {len(kept)} frames and {frames} are needed: give a longer video")
    return np.concatenate([resize_clip_to_cover(upright(frame)[None], height, width) for frame in kept])


def resize_clip_to_cover(frames_thwc: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resizes frames in [0, 255] until they cover the size, crops the centre: float32 [T, height, width, 3] in [-1, 1].

    Bilinear between the two nearest pixel centres, no antialiasing; the crop starts at half of what is too much,
    rounded down. Both are the reference's way with clips and differ from its way with images.
    """
    covering_height, covering_width = cover(*frames_thwc.shape[1:3], height, width)
    x_thwc = _interpolate(frames_thwc, 1, covering_height, (covering_height - height) // 2, height)
    x_thwc = _interpolate(x_thwc, 2, covering_width, (covering_width - width) // 2, width)
    return to_model(x_thwc)  # last, because a large frame has many pixels that nothing is computed from


def _interpolate(x: np.ndarray, axis: int, size: int, start: int, length: int) -> np.ndarray:
    """Entries start..start+length of `axis` resized to `size`: those that the crop would drop are never computed."""
    last = x.shape[axis] - 1
    centre = (np.arange(start, start + length) + 0.5) * (x.shape[axis] / size) - 0.5
    position = np.clip(centre, 0, last)
    below = position.astype(np.intp)
    shape = [1] * x.ndim
    shape[axis] = length
    weight = (position - below).astype(np.float32).reshape(shape)
    return x.take(below, axis) * (1 - weight) + x.take(np.minimum(below + 1, last), axis) * weight


def open_video(path: str | os.PathLike[str]) -> av.container.InputContainer:
    """Opens a video file for reading, to be closed by the caller (`with`). Raises what PyAV raises."""
    name = os.path.abspath(path)  # because a relative name like "http:x" would be taken for an address
    if int(av.__version__.split(".")[0]) < 19:
        return av.open(name, metadata_errors="replace")  # old tags are not always UTF-8; PyAV 19 takes them as they are
    return av.open(name)


def decode(path: str | os.PathLike[str]) -> Iterator[av.VideoFrame]:
    """The frames of the first video stream, as stored. Raises OsjaxError if there is none, and what PyAV raises."""
    with open_video(path) as container:
        if not container.streams.video:
            raise OsjaxError(f"{path} holds no video stream: give a {_listed(VIDEO_SUFFIXES)} file")
        stream = container.streams.video[0]
        stream.thread_type = "AUTO"
        yield from container.decode(stream)


def upright(frame: av.VideoFrame) -> np.ndarray:
    """A frame as uint8 [H, W, 3]: phones store the sensor's rows, and say in a display matrix which way is up."""
    return np.rot90(frame.to_ndarray(format="rgb24"), round(frame.rotation / 90))


def _listed(suffixes: frozenset[str]) -> str:
    return ", ".join(sorted(suffixes))
