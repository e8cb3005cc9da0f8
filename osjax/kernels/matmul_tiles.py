"""How `osjax/kernels/matmul_sm90.py` cuts a product into tiles, which block computes which, and what a block holds.

B batch, M rows, K input features, N output features.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

from osjax.errors import OsjaxError
from osjax.kernels.epilogues import HEAD, PIECE
from osjax.kernels.hopper import SHARED_BYTES, multiprocessors

CONSUMERS = 2
DEPTH_BYTES = 128  # of a row of inputs in shared memory: the widest swizzle
PANEL_BYTES = 128  # of a row of the result that are copied at once, likewise
HEIGHTS = 2  # along the rows: scale of 8-bit inputs, and of an 8-bit result
VECTORS = 3  # along the columns: bias, scale of 8 bits, and gate or scale of a norm


@dataclasses.dataclass(frozen=True)
class Tile:
    """What a block computes at once: `rows` of each consumer by `columns`. Checks itself.

    stages: blocks of the ring; group: tiles along M that run together, so that they find each other's columns in the L2
    cache; share: what the two blocks of a cluster have in common, "rows" or "columns"."""

    rows: int = 64
    columns: int = 256
    stages: int = 3
    group: int = 12
    share: str = "rows"

    def __post_init__(self) -> None:
        if self.rows % PIECE or self.columns % PIECE or self.stages < 2 or self.group < 1:
            raise OsjaxError(f"{self} cannot be multiplied: rows and columns in multiples of 64, 2 stages or more")
        if self.shared_bytes > SHARED_BYTES:
            raise OsjaxError(f"{self} needs {self.shared_bytes} bytes of shared memory, {SHARED_BYTES} are the most")

    @property
    def all_rows(self) -> int:
        return CONSUMERS * self.rows

    @property
    def pieces(self) -> int:
        return self.rows // PIECE

    @property
    def shared_bytes(self) -> int:
        ring = self.stages * (self.all_rows + self.columns) * DEPTH_BYTES
        vectors = 4 * (VECTORS * CONSUMERS * self.columns + HEIGHTS * self.all_rows)
        return ring + 2 * self.all_rows * self.columns + vectors + 1024


class Scratch(NamedTuple):
    """Shared memory of a block. rows: to copy into, the same memory to multiply from; out: result, the same memory for
    cos and sin before it is there; vectors: along columns; heights: along a consumer's rows."""

    rows: Any
    columns: Any
    out: Any
    vectors: Any
    heights: Any
    ready: Any
    free: Any
    aside: Any


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is fixed when the kernel is traced. steps: along K, of each input; paired: whether two blocks form a
    cluster."""

    tile: Tile
    dtype: jnp.dtype
    out_dtype: jnp.dtype
    batch: int
    steps: tuple[int, ...]
    first_row: int
    tiles_m: int
    tiles_n: int
    paired: bool

    @property
    def depth(self) -> int:
        """Elements of a row that a step multiplies."""
        return DEPTH_BYTES // self.dtype.itemsize

    @property
    def panel(self) -> int:
        """Columns of the result that are copied at once."""
        return PANEL_BYTES // self.out_dtype.itemsize

    @property
    def panels(self) -> int:
        return self.tile.columns // self.panel

    @property
    def units(self) -> tuple[int, int]:
        """Pieces of work of a cluster along M and N."""
        if not self.paired:
            return self.tiles_m, self.tiles_n
        return (self.tiles_m, self.tiles_n // 2) if self.tile.share == "rows" else (-(-self.tiles_m // 2), self.tiles_n)

    @property
    def clusters(self) -> int:
        """That run at once, or single blocks."""
        return min(self.total, multiprocessors() // (2 if self.paired else 1))

    @property
    def total(self) -> int:
        return self.batch * self.units[0] * self.units[1]

    def place(self, index: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """(batch row, tile along M, tile along N) of this block in a piece of work."""
        high, wide = self.units
        group = self.tile.group
        row, index = lax.div(index, high * wide), lax.rem(index, high * wide)
        start, rest = lax.div(index, group * wide) * group, lax.rem(index, group * wide)
        height = jnp.minimum(group, high - start)
        m, n = start + lax.rem(rest, height), lax.div(rest, height)
        if not self.paired:
            return row, m, n
        twin = lax.axis_index("twin")
        return (row, m, 2 * n + twin) if self.tile.share == "rows" else (row, 2 * m + twin, n)

    def scratch(self, aside: int) -> Scratch:
        """aside: copies beside the ring that a consumer waits for in each tile. As in flash_sm90, the copy engine sees
        plain rows, so that their number need not divide by eight, and wgmma the same bytes in tiles of eight rows."""
        tile = self.tile
        swizzle, tiling = plgpu.SwizzleTransform(DEPTH_BYTES), plgpu.TilingTransform((8, self.depth))
        rows = (tile.stages, tile.all_rows, self.depth)
        columns = (self.depth, tile.columns) if self.dtype.itemsize == 2 else (tile.columns, self.depth)
        tables = plgpu.TilingTransform((8, DEPTH_BYTES // 4)), swizzle
        free = functools.partial(plgpu.ClusterBarrier, collective_axes=("twin",)) if self.paired else plgpu.Barrier
        return Scratch(
            rows=plgpu.RefUnion(
                plgpu.SMEM(rows, self.dtype, transforms=(swizzle,)),
                plgpu.SMEM(rows, self.dtype, transforms=(tiling, swizzle)),
            ),
            columns=plgpu.SMEM((tile.stages, *columns), self.dtype, transforms=(tiling, swizzle)),
            out=plgpu.RefUnion(
                plgpu.SMEM(
                    (CONSUMERS, tile.pieces, self.panels, PIECE, self.panel), self.out_dtype, transforms=(swizzle,)
                ),
                plgpu.SMEM((CONSUMERS, tile.columns // 128, PIECE, HEAD // 2), jnp.float32, transforms=tables),
            ),
            vectors=plgpu.SMEM((CONSUMERS, VECTORS, tile.columns), jnp.float32),
            heights=plgpu.SMEM((CONSUMERS, HEIGHTS, tile.rows), jnp.float32),
            ready=plgpu.Barrier(num_arrivals=2, num_barriers=tile.stages),
            free=free(num_arrivals=CONSUMERS, num_barriers=tile.stages),
            aside=plgpu.Barrier(num_arrivals=aside, num_barriers=CONSUMERS),
        )


def measured_best(rows: int, features: int) -> Tile:
    """The tile for so many rows and output features; smaller for few rows, so that every multiprocessor has some."""
    if rows <= 1024:
        return Tile(columns=128, stages=4)
    return Tile(share="columns" if features < 4096 else "rows")
