"""Small video files whose frames can be told apart."""

from pathlib import Path

import numpy as np

from osjax.media import write_mp4

STEP = 8  # levels between frames; H.264 at crf 23 stays within 3 of flat ones


def write_ramp(path: Path, num_frames: int, height: int = 32, width: int = 32, fps: float = 24) -> Path:
    """Frame i is flat with level STEP · (i mod 30): `frame_numbers` reads i back."""
    levels = (STEP * (np.arange(num_frames) % 30)).astype(np.uint8)
    write_mp4(path, np.broadcast_to(levels[:, None, None, None], (num_frames, height, width, 3)), fps)
    return path


def frame_numbers(clip_thwc: np.ndarray) -> list[int]:
    """The numbers, modulo 30, of frames that `write_ramp` wrote."""
    return np.round(clip_thwc.mean((1, 2, 3)) / STEP).astype(int).tolist()
