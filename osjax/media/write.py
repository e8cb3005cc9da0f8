"""Videos and images out: H.264 in mp4, PNG for a single frame, both with a comment inside."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterable
from fractions import Fraction
from typing import Any

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace
from PIL import Image, PngImagePlugin

from osjax.errors import OsjaxError
from osjax.files import replacing
from osjax.media.clips import open_video
from osjax.media.images import DECODING_ERRORS

_PNG_KEYWORD = "Comment"
# Equal frames should give equal files. x264's output depends on how many threads share a video; and its fast paths for
# rate control, which this option turns off, read memory that they never set: their decisions vary from run to run.
_REPEATABLE = {"threads": "8", "x264-params": "cpu-independent=1"}
_SMPTE_170M = 6  # the number of BT.601's primaries and transfer function in H.264 (table E-3, E-4)


@dataclasses.dataclass(frozen=True)
class MediaInfo:
    """A written file: its frames, size in pixels, frames per second (0 for an image) and comment ('' if none)."""

    frames: int
    height: int
    width: int
    fps: float
    comment: str


def to_uint8(x: Any) -> Any:
    """Values in [-1, 1] (others are clamped) to uint8; any shape, a NumPy or a JAX array, the same kind out.

    Adds a half and truncates, in float32, as the reference's writer does.
    """
    x = x.astype("float32").clip(-1, 1)
    return ((x + 1) / 2 * 255 + 0.5).clip(0, 255).astype("uint8")


def write_mp4(
    path: str | os.PathLike[str],
    frames: Iterable[np.ndarray],
    fps: float,
    comment: str | Callable[[], str] = "",
) -> None:
    """Writes uint8 frames [H, W, 3] as H.264 (crf 23, yuv420p), ready to stream; equal frames give an equal file.

    frames: an array [T, H, W, 3] or an iterator, drawn one by one, so that they can be made while others are encoded.
    comment: stored in the file's comment tag; a function is called after the last frame and may describe them all.
    Raises OsjaxError for an odd size and for what the disk refuses (then no file is left), ValueError for no frames.
    """
    with replacing(path) as temporary:
        encode_mp4(temporary, frames, fps, comment)


def encode_mp4(
    path: str | os.PathLike[str], frames: Iterable[np.ndarray], fps: float, comment: str | Callable[[], str]
) -> None:
    """As `write_mp4`, but straight to `path`, where an error may leave part of a file."""
    with av.open(os.fspath(path), "w", format="mp4", options={"movflags": "faststart"}) as container:
        stream = None
        packets = []  # muxed last, because the comment is fixed when the first one is
        for frame in frames:
            stream = stream or _add_stream(container, *frame.shape[:2], fps)
            packets += stream.encode(_to_yuv(frame))
        if stream is None:
            raise ValueError("a video needs at least one frame")
        packets += stream.encode(None)
        container.metadata["comment"] = comment() if callable(comment) else comment
        container.mux(packets)


def write_png(path: str | os.PathLike[str], frame: np.ndarray, comment: str = "") -> None:
    """Writes one uint8 frame [H, W, 3]. Raises OsjaxError for what the disk refuses (then no file is left)."""
    with replacing(path) as temporary:
        encode_png(temporary, frame, comment)


def encode_png(path: str | os.PathLike[str], frame: np.ndarray, comment: str) -> None:
    """As `write_png`, but straight to `path`, where an error may leave part of a file."""
    text = PngImagePlugin.PngInfo()
    text.add_itxt(_PNG_KEYWORD, comment)
    Image.fromarray(frame).save(path, format="PNG", pnginfo=text)


def probe(path: str | os.PathLike[str]) -> MediaInfo:
    """Describes a video or a PNG without decoding it. Raises OsjaxError if it is neither."""
    try:
        with open(path, "rb") as file:
            is_png = file.read(8) == b"\x89PNG\r\n\x1a\n"
        return _probe_png(path) if is_png else _probe_video(path)
    except FileNotFoundError as error:
        raise OsjaxError(f"no such file: {path}: check the path") from error
    except (av.FFmpegError, Image.DecompressionBombError, *DECODING_ERRORS) as error:
        raise OsjaxError(f"{path} is neither a readable video nor a PNG: give a file that osjax wrote") from error


def _probe_png(path: str | os.PathLike[str]) -> MediaInfo:
    with Image.open(path) as image:
        image.load()  # text may follow the pixels
        return MediaInfo(1, image.height, image.width, 0.0, image.info.get(_PNG_KEYWORD, ""))


def _probe_video(path: str | os.PathLike[str]) -> MediaInfo:
    with open_video(path) as container:
        if not container.streams.video:
            raise ValueError("no video stream")
        stream = container.streams.video[0]
        comment = container.metadata.get("comment", "")
        return MediaInfo(stream.frames, stream.height, stream.width, float(stream.average_rate or 0), comment)


def _add_stream(container: av.container.OutputContainer, height: int, width: int, fps: float) -> av.VideoStream:
    if height % 2 or width % 2:
        raise OsjaxError(f"a video of {width}x{height} cannot be stored as mp4: choose an even width and height")
    rate = Fraction(fps).limit_denominator(1001)  # 30000/1001 and its like come out exact
    stream = container.add_stream("libx264", rate=rate, options={"crf": "23", **_REPEATABLE})
    stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
    codec = stream.codec_context
    # Say what the conversion in `_to_yuv` does; left unsaid, players guess by the picture's size.
    codec.colorspace, codec.color_range = Colorspace.ITU601, ColorRange.MPEG
    codec.color_primaries = codec.color_trc = _SMPTE_170M
    return stream


def _to_yuv(frame: np.ndarray) -> av.VideoFrame:
    """BT.601 in the limited range: what every reader assumes that ignores the tags."""
    rgb = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
    return rgb.reformat(format="yuv420p", dst_colorspace="ITU601", dst_color_range="MPEG")
