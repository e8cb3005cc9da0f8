"""Tiled encoding and decoding of videos: overlapping tiles whose seams are blended linearly.

B batch, T/H/W frames/height/width of the tiled array (pixels when encoding, latents when decoding), C channels.

Tiling changes the result (each tile is padded and normalised by itself), so parity with the reference means its very
tiles and its very blends: time tiles outside, space tiles inside; a tile is blended with the tile above, then with the
tile on its left, both of which are blended already; only then is it cropped.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Self

import jax
import jax.numpy as jnp
from flax import nnx

from osjax.errors import OsjaxError

TIME, HEIGHT, WIDTH = 1, 2, 3

Apply = Callable[[jax.Array], jax.Array]
Progress = Callable[[int, int], None]
Order = Callable[[int, int], tuple[int, int]]  # see TiledConfig


@dataclasses.dataclass(frozen=True)
class AxisTiles:
    """Tiles along one axis (or along two, for square tiles).

    size: length of a tile of the input; out_size: what it becomes in the output.
    overlap: share of a tile that the next one covers again.
    causal: the length maps as 1 + n·ratio. Every tile then takes one element more, and all but the first drop the first
        element of their output, which only repeats what the tile before has made.
    """

    size: int
    out_size: int
    overlap: float
    causal: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.overlap < 1 or self.stride < 1 or self.keep < 1:
            raise OsjaxError(
                f"tiles of {self.size} -> {self.out_size} with overlap {self.overlap} cannot advance: "
                "choose larger tiles or a smaller overlap"
            )

    @property
    def stride(self) -> int:
        """Distance between two starts, in the input."""
        return int(self.size * (1 - self.overlap))

    @property
    def blend(self) -> int:
        """Length of a seam, in the output."""
        return int(self.out_size * self.overlap)

    @property
    def keep(self) -> int:
        """Length that a tile contributes, in the output."""
        return self.out_size - self.blend

    def starts(self, length: int) -> range:
        """Where the tiles of an axis of that length begin; a causal tail of one element would leave nothing."""
        return range(0, max(1, length - int(self.causal)), self.stride)

    def lengths(self, length: int) -> list[int]:
        """Lengths of the tiles of an axis of that length."""
        return [min(self.size + int(self.causal), length - start) for start in self.starts(length)]


@dataclasses.dataclass(frozen=True)
class Tiling:
    """How to tile time and space; None: not at all. Applies only to arrays larger than one tile."""

    time: AxisTiles | None = None
    space: AxisTiles | None = None

    def lengths(self, t: int, h: int, w: int) -> tuple[list[int], list[int], list[int]]:
        """Lengths of the tiles along time, height and width, of an input of t frames of h by w."""
        in_time = self.time.lengths(t) if self._in_time(t) else [t]
        return (in_time, self.space.lengths(h), self.space.lengths(w)) if self._in_space(h, w) else (in_time, [h], [w])

    def count(self, t: int, h: int, w: int) -> int:
        """Number of tiles of an input of t frames of h by w."""
        return math.prod(map(len, self.lengths(t, h, w)))

    def _in_time(self, t: int) -> bool:
        return self.time is not None and t > self.time.size

    def _in_space(self, h: int, w: int) -> bool:
        return self.space is not None and max(h, w) > self.space.size


class TiledConfig(abc.ABC):
    """Config of an autoencoder that runs tile by tile. `_tiling(order)` is its own: the tiles of what goes in, where
    order(of pixels, of latents) gives (of what goes in, of what comes out)."""

    @property
    def encode_tiling(self) -> Tiling:
        """Tiles of the video."""
        return self._tiling(lambda pixels, latents: (pixels, latents))

    @property
    def decode_tiling(self) -> Tiling:
        """Tiles of the latents."""
        return self._tiling(lambda pixels, latents: (latents, pixels))

    @abc.abstractmethod
    def _tiling(self, order: Order) -> Tiling:
        """The tiles that this autoencoder runs by."""


class TiledModel(nnx.Module):
    """Autoencoder with a `TiledConfig`, `config`, that also has the fields use_spatial_tiling, use_temporal_tiling."""

    def with_tiling(self, *, spatial: bool, temporal: bool) -> Self:
        """The same model (its arrays are shared, compiled tiles are reused) with tiling switched as given."""
        other = jax.tree.map(lambda leaf: leaf, self)
        other.config = dataclasses.replace(self.config, use_spatial_tiling=spatial, use_temporal_tiling=temporal)
        return other


def apply_tiled(apply: Apply, x_bthwc: jax.Array, tiling: Tiling, progress: Progress | None = None) -> jax.Array:
    """`apply` over the tiles of x, stitched together.

    apply: [B, T, H, W, C] -> [B, T', H', W', C'], called with tiles of few different shapes: jit it once outside.
    progress: called with (tiles done, tiles in all) after each tile is computed; for use outside jit.
    """
    _, t, h, w, _ = x_bthwc.shape
    if progress is not None:
        apply = _reporting(apply, tiling.count(t, h, w), progress)
    if tiling._in_space(h, w):
        apply = functools.partial(_apply_space, apply, axis=tiling.space)
    if tiling._in_time(t):
        return _apply_time(apply, x_bthwc, tiling.time)
    return apply(x_bthwc)


def check_video(x: jax.Array, channels: int, what: str) -> None:
    """Raises OsjaxError, naming the array as `what`, if it is no [B, T, H, W, channels]."""
    if x.ndim != 5 or x.shape[-1] != channels or 0 in x.shape:
        raise OsjaxError(
            f"the {what} has shape {x.shape}: give [batch, time, height, width, {channels}], none of them 0"
        )


def _apply_time(apply: Apply, x_bthwc: jax.Array, axis: AxisTiles) -> jax.Array:
    extra = int(axis.causal)
    parts, before = [], None
    for start in axis.starts(x_bthwc.shape[TIME]):
        tile = apply(x_bthwc[:, start : start + axis.size + extra])
        if before is None:
            parts.append(tile[:, : axis.keep + extra])
        else:
            tile = _blend(before, tile[:, extra:], axis.blend, TIME)
            parts.append(tile[:, : axis.keep])
        before = _end(tile, axis.blend, TIME)
    return jnp.concatenate(parts, TIME)


def _apply_space(apply: Apply, x_bthwc: jax.Array, axis: AxisTiles) -> jax.Array:
    rows = []
    above: dict[int, jax.Array] = {}  # the lower edge of the latest tile of each column: all that a later blend reads
    for top in axis.starts(x_bthwc.shape[HEIGHT]):
        row, left = [], None
        for start in axis.starts(x_bthwc.shape[WIDTH]):
            tile = apply(x_bthwc[:, :, top : top + axis.size, start : start + axis.size])
            if start in above:
                tile = _blend(above[start], tile, axis.blend, HEIGHT)
            if left is not None:
                tile = _blend(left, tile, axis.blend, WIDTH)
            above[start], left = _end(tile, axis.blend, HEIGHT), _end(tile, axis.blend, WIDTH)
            row.append(tile[:, :, : axis.keep, : axis.keep])
        rows.append(jnp.concatenate(row, WIDTH))
    return jnp.concatenate(rows, HEIGHT)


def _end(x: jax.Array, extent: int, dim: int) -> jax.Array:
    """The last `extent` elements along dim, or all there are."""
    return jax.lax.slice_in_dim(x, max(0, x.shape[dim] - extent), x.shape[dim], axis=dim)


@functools.partial(jax.jit, static_argnames=("extent", "dim"))
def _blend(before: jax.Array, tile: jax.Array, extent: int, dim: int) -> jax.Array:
    """`tile` with its first `extent` elements along dim faded in, from weight 0, over the last ones of `before`."""
    extent = min(before.shape[dim], tile.shape[dim], extent)
    weight = jnp.arange(extent, dtype=jnp.float32) / max(extent, 1)
    weight = weight.reshape([-1 if d == dim else 1 for d in range(tile.ndim)])
    start, rest = jnp.split(tile, [extent], dim)
    seam = _end(before, extent, dim) * (1 - weight) + start * weight
    return jnp.concatenate([seam.astype(tile.dtype), rest], dim)


def _reporting(apply: Apply, total: int, progress: Progress) -> Apply:
    done = 0

    def apply_and_report(tile: jax.Array) -> jax.Array:
        nonlocal done
        out = jax.block_until_ready(apply(tile))
        done += 1
        progress(done, total)
        return out

    return apply_and_report
