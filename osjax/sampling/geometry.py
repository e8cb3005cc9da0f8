"""Sizes: from a resolution's name to pixels, from pixels to latents, from latents to tokens and back.

b batch, t latent frames, h, w latent rows and columns, c latent channels, n tokens, p patch size.
`multiple` is everywhere the side of one token in pixels: the autoencoder's spatial compression times the patch size,
16 for the Hunyuan VAE (8 · 2) and 32 for the video DC-AE (32 · 1).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re

import jax
import numpy as np
from einops import rearrange

from osjax.errors import OsjaxError

# The order matters: of equal sizes the training table keeps the first, and a reversed ratio replaces the plain one.
ASPECT_RATIOS = ("2.39:1", "2:1", "16:9", "1.85:1", "9:16", "5:8", "3:2", "4:3", "1:1")
FREE_SIZE_MULTIPLE = 16
MAX_FRAMES = 129


def resolution_pixels(resolution: str) -> int:
    """Area in pixels of "<n>px" (n², as 256px) or "<n>p" (the 16:9 picture with n rows, as 720p).

    Raises OsjaxError for any other name.
    """
    match = re.fullmatch(r"([1-9]\d*)(px|p)", resolution)
    if match is None:
        raise OsjaxError(f"unknown resolution {resolution!r}: give 256px, 768px or another <n>px, or <n>p such as 720p")
    side = int(match[1])
    return side * side if match[2] == "px" else side * side * 16 // 9


def image_size(resolution: str, aspect_ratio: str, multiple: int = 16, training: bool = False) -> tuple[int, int]:
    """(height, width) in pixels, multiples of `multiple`, with about the area of the resolution.

    aspect_ratio is width:height, one of ASPECT_RATIOS or its reverse. The inference table (training=False) never
    exceeds the area. The training table, which upstream's text-to-image uses too, moves to a neighbour of closer area
    and drops a ratio whose size an earlier one has.

    Raises OsjaxError, naming the known ones, for an unknown resolution or a ratio that the table does not hold.
    """
    sizes = _size_table(resolution_pixels(resolution), multiple, training)
    if aspect_ratio not in sizes:
        raise OsjaxError(f"no aspect ratio {aspect_ratio!r} at {resolution}: give one of {', '.join(sizes)}")
    height, width = sizes[aspect_ratio]
    if min(height, width) < multiple:
        raise OsjaxError(f"{resolution} at {aspect_ratio} is smaller than one token: give a larger resolution")
    return height, width


def size_of_image(resolution: str, aspect_ratio: str | None, video: tuple[int, int]) -> tuple[int, int]:
    """(height, width) of a picture that a video of that (height, width) is to start from: as the training table has it,
    and for a ratio that it does not hold, or none, the video's own at that area.

    Raises OsjaxError for an unknown resolution.
    """
    pixels = resolution_pixels(resolution)
    sizes = _size_table(pixels, FREE_SIZE_MULTIPLE, True)
    if aspect_ratio in sizes:
        return sizes[aspect_ratio]
    height, width = _floor_size(pixels, video[1] / video[0], FREE_SIZE_MULTIPLE)
    return max(height, FREE_SIZE_MULTIPLE), max(width, FREE_SIZE_MULTIPLE)


@functools.cache
def _size_table(pixels: int, multiple: int, training: bool) -> dict[str, tuple[int, int]]:
    plain, reverse = {}, {}
    for ratio in ASPECT_RATIOS:
        wide, high = ratio.split(":")
        size = _floor_size(pixels, float(wide) / float(high), multiple)
        if training:
            size = _closest_area(size, pixels, multiple)
            if size in plain.values():
                continue
        plain[ratio] = size
        reverse[f"{high}:{wide}"] = size[::-1]
    return plain | reverse


def _floor_size(pixels: int, ratio: float, multiple: int) -> tuple[int, int]:
    """Width from the ratio, then height from the area that is left, each rounded down."""
    width = int(math.sqrt(pixels * ratio) // multiple) * multiple
    height = int(pixels / width // multiple) * multiple if width else 0
    return height, width


def _closest_area(size: tuple[int, int], pixels: int, multiple: int) -> tuple[int, int]:
    """The size or that one of its four neighbours, one multiple away, whose area is closest; the first of equals."""
    height, width = size
    neighbours = [
        (height - multiple, width),
        (height + multiple, width),
        (height, width - multiple),
        (height, width + multiple),
    ]
    return min([size, *neighbours], key=lambda hw: abs(hw[0] * hw[1] - pixels))


def round_up_size(height: int, width: int) -> tuple[int, int]:
    """A free size, rounded up to multiples of 16 as upstream does for every autoencoder. Raises OsjaxError below 1."""
    if height < 1 or width < 1:
        raise OsjaxError(f"size {height}x{width} is empty: give a height and a width of at least 1 pixel")
    return _round_up(height, FREE_SIZE_MULTIPLE), _round_up(width, FREE_SIZE_MULTIPLE)


def _round_up(value: int, multiple: int) -> int:
    return math.ceil(value / multiple) * multiple


def latent_frames(num_frames: int, ratio: int = 4, causal: bool = True) -> int:
    """Latent frames of a clip at temporal compression `ratio`: (T − 1) // ratio + 1 if causal, else T // ratio.

    A causal autoencoder gives the first frame a latent of its own; a single frame is one latent for either kind.
    """
    if num_frames == 1:
        return 1
    return (num_frames - 1) // ratio + 1 if causal else num_frames // ratio


def check_frames(num_frames: int, ratio: int = 4, causal: bool = True, limit: int = MAX_FRAMES) -> None:
    """Raises OsjaxError, naming the nearest count, unless the autoencoder can return exactly num_frames frames.

    Those are ratio·k + 1 if it is causal, else 1 and ratio·k; never more than `limit`.
    """
    rest = int(causal)
    if 1 <= num_frames <= limit and (num_frames == 1 or num_frames % ratio == rest % ratio):
        return
    groups = round((min(num_frames, limit) - rest) / ratio)
    groups = min(groups, (limit - rest) // ratio)
    nearest = ratio * groups + rest if groups > 0 else 1
    rule = f"{ratio}k+1" if causal else f"1 or {ratio}k"
    raise OsjaxError(f"{num_frames} frames cannot be drawn ({rule} frames, at most {limit}): ask for {nearest}")


@dataclasses.dataclass(frozen=True)
class LatentGrid:
    """A video as the transformer sees it: t latent frames of h × w latents, grouped into patch × patch tokens."""

    t: int
    h: int
    w: int
    patch: int

    def __post_init__(self) -> None:
        if min(self.t, self.h, self.w, self.patch) < 1 or self.h % self.patch or self.w % self.patch:
            raise ValueError(f"{self} does not divide into patches")

    @property
    def tokens_per_frame(self) -> int:
        return (self.h // self.patch) * (self.w // self.patch)

    @property
    def tokens(self) -> int:
        return self.t * self.tokens_per_frame

    def noise_shape(self, channels: int, batch: int = 1) -> tuple[int, int, int, int, int]:
        """Shape of the latents, bthwc."""
        return batch, self.t, self.h, self.w, channels


def latent_grid(
    height: int,
    width: int,
    num_frames: int,
    *,
    multiple: int = 16,
    patch: int = 2,
    ratio: int = 4,
    causal: bool = True,
) -> LatentGrid:
    """The grid of num_frames frames of height × width pixels: sides are patch · ceil(pixels / multiple) latents."""
    return LatentGrid(
        t=latent_frames(num_frames, ratio, causal),
        h=patch * math.ceil(height / multiple),
        w=patch * math.ceil(width / multiple),
        patch=patch,
    )


def pack(z_bthwc: jax.Array, patch: int) -> jax.Array:
    """Latents to tokens [b, t·(h/p)·(w/p), c·p²]; within a token the order is channel, patch row, patch column."""
    return rearrange(z_bthwc, "b t (h ph) (w pw) c -> b (t h w) (c ph pw)", ph=patch, pw=patch)


def unpack(x_bnc: jax.Array, grid: LatentGrid) -> jax.Array:
    """Tokens back to latents bthwc: the inverse of `pack` on that grid."""
    patch = grid.patch
    return rearrange(
        x_bnc,
        "b (t h w) (c ph pw) -> b t (h ph) (w pw) c",
        t=grid.t,
        h=grid.h // patch,
        w=grid.w // patch,
        ph=patch,
        pw=patch,
    )


def image_ids(grid: LatentGrid) -> np.ndarray:
    """Positions of the tokens, int32 [n, 3]: frame, token row, token column. Text tokens stand at (0, 0, 0)."""
    sides = (grid.t, grid.h // grid.patch, grid.w // grid.patch)
    return np.indices(sides, dtype=np.int32).reshape(3, -1).T
