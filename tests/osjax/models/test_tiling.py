"""Tiles and blends against the definition written out element by element."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from osjax.errors import OsjaxError
from osjax.models.tiling import AxisTiles, Tiling, apply_tiled

TOLERANCE = 1e-5  # a few float32 blends of values of order one


@jax.jit
def network(tile):
    """Doubles height and width and makes 1 + 2·(n - 1) frames of n; it marks each tile, so that seams show."""
    tile = tile + jnp.sin(10 * tile.sum(axis=(1, 2, 3), keepdims=True))
    return tile.repeat(2, 1)[:, 1:].repeat(2, 2).repeat(2, 3)


def fade(before, tile, extent, dim):
    """In place: the first elements of `tile` along dim, faded in over the last ones of `before`."""
    extent = min(extent, before.shape[dim], tile.shape[dim])
    before, tile = np.moveaxis(before, dim, 0), np.moveaxis(tile, dim, 0)
    for i in range(extent):
        tile[i] = before[len(before) - extent + i] * (1 - i / extent) + tile[i] * (i / extent)


def tiled_in_place(x, size, overlap):
    """All tiles first; then each blended in place with the one above and the one on its left; then cropped."""
    stride, blend = int(size * (1 - overlap)), int(2 * size * overlap)
    tops, lefts = range(0, x.shape[2], stride), range(0, x.shape[3], stride)
    tiles = [[np.array(network(x[:, :, i : i + size, j : j + size])) for j in lefts] for i in tops]
    for i, row in enumerate(tiles):
        for j, tile in enumerate(row):
            if i:
                fade(tiles[i - 1][j], tile, blend, 2)
            if j:
                fade(row[j - 1], tile, blend, 3)
    keep = 2 * size - blend
    return np.concatenate([np.concatenate([t[:, :, :keep, :keep] for t in row], 3) for row in tiles], 2)


def tiled_in_time(x, size, overlap):
    """Tiles of one frame more than `size`; all but the first drop their first frame, before blending."""
    stride, blend = int(size * (1 - overlap)), int(2 * size * overlap)
    tiles = [np.array(network(x[:, i : i + size + 1])) for i in range(0, x.shape[1], stride)]
    tiles = [tiles[0]] + [tile[:, 1:] for tile in tiles[1:]]
    for before, tile in itertools.pairwise(tiles):
        fade(before, tile, blend, 1)
    keep = 2 * size - blend
    return np.concatenate([tile[:, : keep + (not i)] for i, tile in enumerate(tiles)], 1)


def video(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(
    ("height", "width", "size", "overlap"),
    [(7, 9, 4, 0.25), (9, 4, 4, 0.25), (13, 5, 4, 0.5), (8, 8, 5, 0.3), (9, 9, 3, 0.0), (10, 11, 4, 0.75)],
)
def test_space_tiles_blend_as_in_place(height, width, size, overlap):
    x = video(2, 2, height, width, 1)
    actual = apply_tiled(network, x, Tiling(space=AxisTiles(size, 2 * size, overlap)))
    expected = tiled_in_place(x, size, overlap)
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, atol=TOLERANCE)


@pytest.mark.parametrize(
    ("frames", "size", "overlap"), [(9, 4, 0.25), (7, 4, 0.25), (6, 4, 0.25), (11, 4, 0.5), (5, 2, 0)]
)
def test_time_tiles_blend_as_in_place(frames, size, overlap):
    x = video(1, frames, 2, 3, 1)
    actual = apply_tiled(network, x, Tiling(time=AxisTiles(size, 2 * size, overlap, causal=True)))
    expected = tiled_in_time(x, size, overlap)
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, atol=TOLERANCE)


@pytest.mark.parametrize("causal", [True, False])
def test_a_map_of_single_elements_tiles_without_a_trace(causal):
    """Overlaps of equal values blend to themselves, whatever the weights, and nothing is lost or doubled."""
    x = video(1, 11, 7, 10, 2)
    tiling = Tiling(time=AxisTiles(4, 4, 0.25, causal), space=AxisTiles(4, 4, 0.25))
    np.testing.assert_allclose(apply_tiled(lambda tile: -tile, x, tiling), -x, atol=TOLERANCE)


def test_an_array_within_one_tile_is_one_call():
    x = video(1, 4, 5, 5, 1)
    calls = []
    tiling = Tiling(time=AxisTiles(4, 8, 0.25, causal=True), space=AxisTiles(5, 10, 0.25))
    apply_tiled(lambda tile: calls.append(tile.shape) or tile, x, tiling)
    assert calls == [x.shape]
    assert tiling.count(*x.shape[1:4]) == 1


@pytest.mark.parametrize(("causal", "expected"), [(True, 2), (False, 3)])
def test_only_a_causal_tail_of_one_frame_is_left_out(causal, expected):
    calls = []
    tiling = Tiling(time=AxisTiles(4, 4, 0.25, causal))
    apply_tiled(lambda tile: calls.append(tile.shape) or tile, video(1, 7, 2, 2, 1), tiling)
    assert len(calls) == tiling.count(7, 2, 2) == expected


def test_progress_counts_every_tile_of_time_and_space():
    seen = []
    tiling = Tiling(time=AxisTiles(4, 8, 0.25, causal=True), space=AxisTiles(4, 8, 0.25))
    apply_tiled(network, video(1, 9, 7, 5, 1), tiling, lambda done, total: seen.append((done, total)))
    assert seen == [(i, 18) for i in range(1, 19)]  # starts 0, 3, 6 of 9 frames and of 7 rows; 0, 3 of 5 columns


@pytest.mark.parametrize(
    ("size", "out_size", "overlap"), [(0, 8, 0.25), (4, 0, 0.25), (4, 8, 1), (1, 8, 0.5), (4, 8, -0.1)]
)
def test_tiles_that_cannot_advance_are_refused(size, out_size, overlap):
    with pytest.raises(OsjaxError, match=r"cannot advance: .*larger tiles or a smaller overlap"):
        AxisTiles(size, out_size, overlap)
