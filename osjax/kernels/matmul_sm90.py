"""Products with weights for Hopper GPUs (compute capability 9.0) as one Pallas Mosaic-GPU kernel.

What follows a product in a transformer's block is done to it in registers, and weights are read where they lie in their
stack of layers.

CUDA blocks are persistent: each computes one tile of the output after the other. A producer warpgroup feeds inputs and
weights into a ring in shared memory through the copy engine (TMA), and runs ahead into the next tile; two consumers own
half of a tile's rows each and keep their sums in registers. Two blocks form a cluster whose tiles have the same rows,
or the same columns: what is the same for both is read once, because the L2 cache cannot feed every block by itself.

B batch, M rows (tokens), K input features, N output features, L layers, H heads, D head width.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from osjax.errors import OsjaxError

CONSUMERS = 2
PIECE = 64  # rows of a wgmma instruction
PANEL = 64  # columns of the result that are copied at once: 128 bytes, the widest swizzle
DEPTH_BYTES = 128  # of a row of inputs in shared memory, likewise
VECTORS = 3  # along the columns: bias, scale of 8 bits, and gate or scale of a norm
STEPS_BEFORE_ASIDE = 8
HEAD = 128  # the head width that `Heads` knows: that of the tiles' columns, or half of it
SHARED_BYTES = 227 * 1024
CONSUMER_REGISTERS, PRODUCER_REGISTERS = 240, 24
HOPPER_MULTIPROCESSORS = 132


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
        if self.rows % PIECE or self.columns % PANEL or self.stages < 2 or self.group < 1:
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
    def panels(self) -> int:
        return self.columns // PANEL

    @property
    def shared_bytes(self) -> int:
        ring = self.stages * (self.all_rows + self.columns) * DEPTH_BYTES
        vectors = 4 * (VECTORS * CONSUMERS * self.columns + self.all_rows)
        return ring + 2 * self.all_rows * self.columns + vectors + 1024


class Heads(NamedTuple):
    """After the product, whose columns are queries, keys and values: RMS norm of every head of queries and keys, and
    their rotation. scale_qkd: float32 [2, 128]; turn: cos and sin, float32 [M, 64] each, or None."""

    scale_qkd: jax.Array
    turn: tuple[jax.Array, jax.Array] | None
    epsilon: float = 1e-6


class Added(NamedTuple):
    """After the product: x + gate · product. x_bmn: of the result's type; gate_bn: float32."""

    x_bmn: jax.Array
    gate_bn: jax.Array


class Scales(NamedTuple):
    """What 8-bit inputs and weights are multiplied by, float32: rows_bm of the inputs, columns_n of the weights."""

    rows_bm: jax.Array
    columns_n: jax.Array


After = Heads | Added | Callable[[jax.Array], jax.Array] | None


class Scratch(NamedTuple):
    """Shared memory of a block. rows: to copy into, the same memory to multiply from; out: result, the same memory for
    cos and sin before it is there; vectors: along columns; heights: scales of a consumer's rows."""

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
    """What is fixed when the kernel is traced. steps: along K, of each input; clusters: that run at once."""

    tile: Tile
    dtype: jnp.dtype
    out_dtype: jnp.dtype
    batch: int
    steps: tuple[int, ...]
    first_row: int
    tiles_m: int
    tiles_n: int
    paired: bool
    clusters: int

    @property
    def depth(self) -> int:
        """Elements of a row that a step multiplies."""
        return DEPTH_BYTES // self.dtype.itemsize

    @property
    def units(self) -> tuple[int, int]:
        """Pieces of work of a cluster along M and N."""
        if not self.paired:
            return self.tiles_m, self.tiles_n
        return (self.tiles_m, self.tiles_n // 2) if self.tile.share == "rows" else (-(-self.tiles_m // 2), self.tiles_n)

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
                plgpu.SMEM((CONSUMERS, tile.pieces, tile.panels, PIECE, PANEL), self.out_dtype, transforms=(swizzle,)),
                plgpu.SMEM((CONSUMERS, tile.columns // 128, PIECE, HEAD // 2), jnp.float32, transforms=tables),
            ),
            vectors=plgpu.SMEM((CONSUMERS, VECTORS, tile.columns), jnp.float32),
            heights=plgpu.SMEM((CONSUMERS, tile.rows), jnp.float32),
            ready=plgpu.Barrier(num_arrivals=2, num_barriers=tile.stages),
            free=free(num_arrivals=CONSUMERS, num_barriers=tile.stages),
            aside=plgpu.Barrier(num_arrivals=aside, num_barriers=CONSUMERS),
        )


def matmul(
    inputs: Sequence[jax.Array],
    kernel_lkn: jax.Array,
    layer: jax.Array,
    bias_n: jax.Array,
    *,
    after: After = None,
    scales: Scales | None = None,
    out_dtype: jnp.dtype | None = None,
    first_row: int = 0,
    row_count: int | None = None,
    tile: Tile | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array, jax.Array]:
    """concat(inputs, axis=-1) @ kernel[layer] + bias, and what is to be done `after`.

    inputs: [B, M, K1], [B, M, K2], …, bfloat16 or float16; kernel [L, K1 + K2 + …, N] of the same type; or both float8
    with `scales`, and kernel [L, N, K1 + K2 + …]. layer: int32 []; bias float32 [N]; only `row_count` rows from
    `first_row` on; tile: the measured best. Returns [B, rows, N] of `out_dtype`, that of the inputs if not given; for
    `Heads` queries, keys and values, each [B, rows, N/3]. Raises OsjaxError for sizes that do not divide.
    """
    batch, all_rows, _ = inputs[0].shape
    count = all_rows - first_row if row_count is None else row_count
    features = bias_n.shape[0]
    turning = isinstance(after, Heads) and after.turn is not None
    tile = tile or (Tile() if turning else measured_best(count, features))
    dtype = inputs[0].dtype
    out_dtype = jnp.dtype(out_dtype or dtype)
    depth = DEPTH_BYTES // dtype.itemsize
    outputs = 3 if isinstance(after, Heads) else 1
    widths = [x.shape[2] for x in inputs]
    if (
        sum(widths) * features != kernel_lkn[0].size
        or any(w % depth for w in widths)
        or features % (outputs * tile.columns)
    ):
        raise OsjaxError(f"{[x.shape for x in inputs]} and {kernel_lkn.shape} cannot be multiplied by {tile}: use XLA")
    if turning and tile.rows * tile.columns < PIECE * 2 * HEAD:
        raise OsjaxError(f"{tile} leaves no room for cos and sin: take 256 columns")
    tiles_m, tiles_n = pl.cdiv(count, tile.all_rows), features // tile.columns
    paired = tile.share == "columns" or tiles_n % 2 == 0
    steps = tuple(width // depth for width in widths)
    problem = Problem(tile, dtype, out_dtype, batch, steps, first_row, tiles_m, tiles_n, paired, 0)
    clusters = min(problem.total, multiprocessors() // (2 if paired else 1))
    problem = dataclasses.replace(problem, clusters=clusters)
    operands = [*inputs, kernel_lkn, layer.reshape(1).astype(jnp.int32), bias_n.astype(jnp.float32)]
    aside = 1
    behind = (0, (tiles_m + 1) * tile.all_rows - count)
    if scales is not None:
        operands += [scales.columns_n.astype(jnp.float32), jnp.pad(scales.rows_bm, ((0, 0), behind))]
        aside += 2
    if isinstance(after, Heads):
        scale_qkvd = jnp.concatenate([after.scale_qkd, jnp.ones((1, HEAD))])
        operands += [jnp.tile(scale_qkvd, (1, tile.columns // HEAD))]
        aside += 1
        if after.turn is not None:
            operands += [jnp.pad(table_md, (behind, (0, 0))) for table_md in after.turn]
            aside += 2
    elif isinstance(after, Added):
        operands += [after.gate_bn.astype(jnp.float32), after.x_bmn]
        aside += 1 + tile.pieces * tile.panels

    def matmul_sm90(*refs: Any) -> None:
        sources, (kernel, layer_gmem, bias, *extra) = refs[: len(inputs)], refs[len(inputs) : len(operands)]
        outs, scratch = refs[len(operands) : len(operands) + outputs], refs[-1]
        warpgroup, cluster = lax.axis_index("warpgroup"), lax.axis_index("cluster")
        rounds = lax.div(problem.total - cluster + clusters - 1, clusters)

        @pl.when(warpgroup == CONSUMERS)
        def _producer() -> None:
            plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
            produce(problem, rounds, sources, kernel.at[layer_gmem[0]], scratch)

        @pl.when(warpgroup < CONSUMERS)
        def _consumer() -> None:
            plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
            consume(problem, rounds, after, scales is not None, bias, extra, outs, scratch)

    found = plgpu.kernel(
        matmul_sm90,
        out_type=[jax.ShapeDtypeStruct((batch, count, features // outputs), out_dtype)] * outputs,
        scratch_types=[problem.scratch(aside)],
        grid=(clusters,),
        grid_names=("cluster",),
        cluster=(2,) if paired else (),
        cluster_names=("twin",) if paired else (),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, reduction_scratch_bytes=128, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )(*operands)
    return tuple(found) if outputs > 1 else found[0]


def measured_best(rows: int, features: int) -> Tile:
    """The tile for so many rows and output features; smaller for few rows, so that every multiprocessor has some."""
    if rows <= 1024:
        return Tile(columns=128, stages=4)
    return Tile(share="columns" if features < 4096 else "rows")


def multiprocessors() -> int:
    """Of the device; of an H100 where there is no GPU, as when lowering on a CPU."""
    device = jax.devices()[0]
    return device.core_count if device.platform == "gpu" else HOPPER_MULTIPROCESSORS


def produce(problem: Problem, rounds: jax.Array, sources: Sequence[Any], kernel: Any, scratch: Scratch) -> None:
    """The producer: copies the rows and the columns of step after step, tile after tile."""
    tile, depth = problem.tile, problem.depth
    shared = {"collective_axes": "twin"} if problem.paired else {}
    of_rows, of_columns = (shared, {}) if tile.share == "rows" else ({}, shared)

    def feed(turn: jax.Array, done: jax.Array) -> jax.Array:
        row, m, n = problem.place(lax.axis_index("cluster") + turn * problem.clusters)
        rows = pl.ds(problem.first_row + m * tile.all_rows, tile.all_rows)
        columns = pl.ds(n * tile.columns, tile.columns)
        before = 0
        for source, steps in zip(sources, problem.steps, strict=True):

            def one(step: jax.Array, done: jax.Array, source: Any = source, before: int = before) -> jax.Array:
                slot = lax.rem(done, tile.stages)

                @pl.when(done >= tile.stages)
                def _wait() -> None:
                    plgpu.barrier_wait(scratch.free.at[slot])

                def copy(gmem: Any, smem: Any, shared: dict[str, str]) -> None:
                    plgpu.copy_gmem_to_smem(gmem, smem.at[slot], scratch.ready.at[slot], **shared)

                copy(source.at[row, rows, pl.ds(step * depth, depth)], scratch.rows[0], of_rows)
                here = pl.ds((before + step) * depth, depth)
                weights = kernel.at[here, columns] if problem.dtype.itemsize == 2 else kernel.at[columns, here]
                copy(weights, scratch.columns, of_columns)
                return done + 1

            done = lax.fori_loop(0, steps, one, done)
            before += steps
        return done

    fed = lax.fori_loop(0, rounds, feed, jnp.int32(0))

    # The other block of the cluster frees slots here, too: this one must not be gone by then.
    @pl.loop(jnp.maximum(fed - tile.stages, 0), fed)
    def _see_the_end(done: jax.Array) -> None:
        plgpu.barrier_wait(scratch.free.at[lax.rem(done, tile.stages)])


def consume(
    problem: Problem,
    rounds: jax.Array,
    after: After,
    scaled: bool,
    bias: Any,
    extra: Sequence[Any],
    outs: Sequence[Any],
    scratch: Scratch,
) -> None:
    """A consumer: its rows of tile after tile."""
    tile, steps = problem.tile, sum(problem.steps)
    consumer = lax.axis_index("warpgroup")
    out_smem, tables = (view.at[consumer] for view in scratch.out)
    vectors, heights, aside = (part.at[consumer] for part in (scratch.vectors, scratch.heights, scratch.aside))
    of_scales, extra = (extra[:2], extra[2:]) if scaled else ((), extra)
    turning = isinstance(after, Heads) and after.turn is not None
    panels = [(piece, panel) for piece in range(tile.pieces) for panel in range(tile.panels)]
    width = tile.columns * problem.tiles_n // len(outs)

    def one_tile(turn: jax.Array, done: jax.Array) -> jax.Array:
        row, m, n = problem.place(lax.axis_index("cluster") + turn * problem.clusters)
        first, column = m * tile.all_rows + consumer * tile.rows, n * tile.columns
        columns = pl.ds(column, tile.columns)
        which, column = lax.div(column, width), lax.rem(column, width)

        def panel_of(array: Any, piece: int, panel: int) -> Any:
            return array.at[row, pl.ds(first + piece * PIECE, PIECE), pl.ds(column + panel * PANEL, PANEL)]

        def fetch_aside() -> None:
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the tile before
            plgpu.copy_gmem_to_smem(bias.at[columns], vectors.at[0], aside)
            if scaled:
                plgpu.copy_gmem_to_smem(of_scales[0].at[columns], vectors.at[1], aside)
                own = pl.ds(problem.first_row + first, tile.rows)
                plgpu.copy_gmem_to_smem(of_scales[1].at[row, own], heights, aside)
            if isinstance(after, Heads):
                plgpu.copy_gmem_to_smem(extra[0].at[which], vectors.at[2], aside)
                for index, table in enumerate(extra[1:]):
                    plgpu.copy_gmem_to_smem(table.at[pl.ds(first, PIECE)], tables.at[index], aside)
            elif isinstance(after, Added):
                plgpu.copy_gmem_to_smem(extra[0].at[row, columns], vectors.at[2], aside)
                for piece, panel in panels:
                    plgpu.copy_gmem_to_smem(panel_of(extra[1], piece, panel), out_smem.at[piece, panel], aside)

        def multiply(step: jax.Array, sums: Sequence[Any]) -> None:
            slot = lax.rem(step, tile.stages)
            plgpu.barrier_wait(scratch.ready.at[slot])
            for piece, sum_ref in enumerate(sums):
                rows = pl.ds(consumer * tile.rows + piece * PIECE, PIECE)
                weights = scratch.columns.at[slot]
                plgpu.wgmma(
                    sum_ref, scratch.rows[1].at[slot, rows], weights if problem.dtype.itemsize == 2 else weights.T
                )

        def product(*sums: Any) -> list[jax.Array]:
            def next_step(step: jax.Array, _: None) -> None:
                multiply(step, sums)
                plgpu.wgmma_wait(tile.pieces)  # of the step before, whose slot nobody reads any more
                plgpu.barrier_arrive(scratch.free.at[lax.rem(step - 1, tile.stages)])

            multiply(done, sums)
            # Not at once: it waits until what the tile before has stored was read.
            later = done + min(steps, 1 + STEPS_BEFORE_ASIDE)
            lax.fori_loop(done + 1, later, next_step, None)
            fetch_aside()
            lax.fori_loop(later, done + steps, next_step, None)
            return [each[...] for each in sums]

        found = pl.run_scoped(product, *[plgpu.ACC((PIECE, tile.columns), jnp.float32)] * tile.pieces)
        plgpu.barrier_arrive(scratch.free.at[lax.rem(done + steps - 1, tile.stages)])
        plgpu.barrier_wait(aside)

        def whole(piece: int) -> jax.Array:
            y = found[piece]
            if scaled:
                own = load(heights.at[pl.ds(piece * PIECE, PIECE)], plgpu.Layout.WGMMA.reduce(1))
                y = y * lax.broadcast_in_dim(own, y.shape, [0]) * over_rows(vectors.at[1])
            return y + over_rows(vectors.at[0])

        def finish(piece: int, y: jax.Array) -> list[jax.Array]:
            if isinstance(after, Heads):
                # Values take the same way and come out as they were. Three ways would keep the sums in registers beside
                # what is made of them, and there is no room for both.
                value = lax.div(which, 2).astype(jnp.float32)
                found = heads_normed(y, over_rows(vectors.at[2]), after.epsilon, value)
                if not turning:
                    return [panel for head in found for panel in cut(head, PANEL)]
                cos, sin = (load(tables.at[index], plgpu.Layout.WGMMA) for index in range(2))
                plgpu.commit_smem()  # all have read them: what is stored takes their place
                cos, sin = cos * (1.0 - value) + value, sin * (1.0 - value)
                return [panel for head in found for panel in rotated(head, cos, sin)]
            if isinstance(after, Added):
                x = [load(out_smem.at[piece, panel], plgpu.Layout.WGMMA) for panel in range(tile.panels)]
                gated = cut(over_rows(vectors.at[2]) * y, PANEL)
                return [a.astype(jnp.float32) + b for a, b in zip(x, gated, strict=True)]
            return cut(after(y) if after else y, PANEL)

        for piece in range(tile.pieces):
            for panel, z in enumerate(finish(piece, whole(piece))):
                out_smem.at[piece, panel][...] = stored(z, problem.out_dtype)
        plgpu.commit_smem()

        def store(out: Any) -> None:
            for piece, panel in panels:
                plgpu.copy_smem_to_gmem(out_smem.at[piece, panel], panel_of(out, piece, panel))

        if len(outs) == 1:
            store(outs[0])
        else:
            for part, out in enumerate(outs):
                pl.when(which == part)(functools.partial(store, out))
        return done + steps

    lax.fori_loop(0, rounds, one_tile, jnp.int32(0))
    plgpu.wait_smem_to_gmem(0)


def heads_normed(y: jax.Array, scale: jax.Array, epsilon: float, value: jax.Array) -> list[jax.Array]:
    """[R, 128 · heads] → [R, 128] each, divided by their root mean square and scaled. scale: as y; value: 1.0 for what
    is not to be divided, else 0.0."""
    found = []
    for head, own in zip(cut(y, HEAD), cut(scale, HEAD), strict=True):
        mean = (head * head).sum(axis=1) * (1.0 / HEAD)
        factor = lax.rsqrt(mean + epsilon) * (1.0 - value) + value
        found.append(head * lax.broadcast_in_dim(factor, head.shape, [0]) * own)
    return found


def rotated(head: jax.Array, cos: jax.Array, sin: jax.Array) -> list[jax.Array]:
    """Both halves of [R, 128], the pairs (i, i + 64) turned. cos, sin [R, 64]."""
    first, second = cut(head, HEAD // 2)
    return [first * cos - second * sin, second * cos + first * sin]


def cut(y: jax.Array, width: int) -> list[jax.Array]:
    """Its columns in parts of that width."""
    return [y[:, start : start + width] for start in range(0, y.shape[1], width)]


def stored(y: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """In that type; float16 ends at its largest number, as `osjax.models.layers.in_range` has it."""
    if dtype == jnp.float16:
        largest = float(jnp.finfo(dtype).max)
        y = jnp.minimum(jnp.maximum(y, -largest), largest)
    return y.astype(dtype)


def over_rows(vector: Any) -> jax.Array:
    """[N] in shared memory → [64, N], every row the same."""
    values = load(vector, plgpu.Layout.WGMMA.reduce(0))
    return lax.broadcast_in_dim(values, (PIECE, *values.shape), [1])


def load(ref: Any, layout: Any) -> jax.Array:
    """All that `ref` points to, in that layout."""
    # jax 0.10 wants an index beside the reference, from 0.11 on it is deprecated.
    needs_index = inspect.signature(plgpu.load).parameters["idx"].default is inspect.Parameter.empty
    return plgpu.load(ref, *[()] * needs_index, layout=layout, optimized=False)
