"""Products with weights for Hopper GPUs (compute capability 9.0) as one Pallas Mosaic-GPU kernel.

What follows a product in a transformer's block is done to it in registers.

CUDA blocks are persistent: each computes one tile of the output after the other. A producer warpgroup feeds inputs and
weights into a ring in shared memory through the copy engine (TMA), and runs ahead into the next tile; two consumers own
half of a tile's rows each and keep their sums in registers. Two blocks form a cluster whose tiles have the same rows,
or the same columns: what is the same for both is read once, because the L2 cache cannot feed every block by itself.

B batch, M rows (tokens), K input features, N output features, H heads, D head width.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from osjax.errors import OsjaxError
from osjax.kernels.epilogues import (
    HEAD,
    PIECE,
    Added,
    After,
    Heads,
    Hidden,
    Scales,
    cut,
    heads_normed,
    load,
    over_rows,
    rotated,
    stored,
)
from osjax.kernels.hopper import CONSUMER_REGISTERS, PRODUCER_REGISTERS
from osjax.kernels.matmul_tiles import CONSUMERS, DEPTH_BYTES, Problem, Scratch, Tile, measured_best

STEPS_BEFORE_ASIDE = 8  # along K, after which what a tile needs beside its product is fetched


def matmul(
    inputs: Sequence[jax.Array],
    kernel_kn: jax.Array,
    bias_n: jax.Array,
    *,
    after: After = None,
    scales: Scales | None = None,
    out_dtype: jnp.dtype | None = None,
    first_row: int = 0,
    row_count: int | None = None,
    tile: Tile | None = None,
) -> jax.Array | tuple[jax.Array, jax.Array, jax.Array]:
    """concat(inputs, axis=-1) @ kernel + bias, and what is to be done `after`.

    inputs: [B, M, K1], [B, M, K2], …, bfloat16 or float16; kernel [K1 + K2 + …, N] of the same type; or both float8
    with `scales`, and kernel [N, K1 + K2 + …]. bias: float32 [N]; only `row_count` rows from `first_row` on; tile: the
    measured best. Returns [B, rows, N] of `out_dtype`, that of the inputs if not given, float8 for `Hidden`; for
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
        sum(widths) * features != kernel_kn.size
        or any(w % depth for w in widths)
        or features % (outputs * tile.columns)
    ):
        raise OsjaxError(f"{[x.shape for x in inputs]} and {kernel_kn.shape} cannot be multiplied by {tile}: use XLA")
    if turning and tile.rows * tile.columns < PIECE * 2 * HEAD:
        raise OsjaxError(f"{tile} leaves no room for cos and sin: take 256 columns")
    tiles_m, tiles_n = pl.cdiv(count, tile.all_rows), features // tile.columns
    paired = tile.share == "columns" or tiles_n % 2 == 0
    steps = tuple(width // depth for width in widths)
    problem = Problem(tile, dtype, out_dtype, batch, steps, first_row, tiles_m, tiles_n, paired)
    clusters = problem.clusters
    operands = [*inputs, kernel_kn, bias_n.astype(jnp.float32)]
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
        aside += 1 + tile.pieces * problem.panels
    elif isinstance(after, Hidden):
        operands += [jnp.pad(after.inverse_bm, ((0, 0), behind))]
        aside += 1

    def matmul_sm90(*refs: Any) -> None:
        sources, (kernel, bias, *extra) = refs[: len(inputs)], refs[len(inputs) : len(operands)]
        outs, scratch = refs[len(operands) : len(operands) + outputs], refs[-1]
        warpgroup, cluster = lax.axis_index("warpgroup"), lax.axis_index("cluster")
        rounds = lax.div(problem.total - cluster + clusters - 1, clusters)

        @pl.when(warpgroup == CONSUMERS)
        def _producer() -> None:
            plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
            produce(problem, rounds, sources, kernel, scratch)

        @pl.when(warpgroup < CONSUMERS)
        def _consumer() -> None:
            plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
            consumer = Consumer(problem, warpgroup, after, scales is not None, bias, extra, outs, scratch)
            consumer.consume(rounds)

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


@dataclasses.dataclass(frozen=True)
class Spot:
    """Where a consumer's part of a tile lies: row of the batch, first of its rows, first of its columns within its
    output, the columns within all, and which output."""

    row: jax.Array
    first: jax.Array
    column: jax.Array
    columns: pl.Slice
    which: jax.Array

    def panel(self, array: Any, piece: int, panel: int, width: int) -> Any:
        """That panel, so many columns wide, of an array [B, M, N of one output]."""
        return array.at[self.row, pl.ds(self.first + piece * PIECE, PIECE), pl.ds(self.column + panel * width, width)]


@dataclasses.dataclass(frozen=True)
class Consumer:
    """A consumer: its rows of tile after tile. extra: operands behind the bias, those of `Scales` first."""

    problem: Problem
    number: jax.Array
    after: After
    scaled: bool
    bias: Any
    extra: Sequence[Any]
    outs: Sequence[Any]
    scratch: Scratch

    def consume(self, rounds: jax.Array) -> None:
        problem, tile = self.problem, self.problem.tile
        width = tile.columns * problem.tiles_n // len(self.outs)

        def one_tile(turn: jax.Array, done: jax.Array) -> jax.Array:
            row, m, n = problem.place(lax.axis_index("cluster") + turn * problem.clusters)
            column = n * tile.columns
            spot = Spot(
                row=row,
                first=m * tile.all_rows + self.number * tile.rows,
                column=lax.rem(column, width),
                columns=pl.ds(column, tile.columns),
                which=lax.div(column, width),
            )
            product = functools.partial(self._product, spot, done)
            sums = pl.run_scoped(product, *[plgpu.ACC((PIECE, tile.columns), jnp.float32)] * tile.pieces)
            done = done + sum(problem.steps)
            plgpu.barrier_arrive(self.scratch.free.at[lax.rem(done - 1, tile.stages)])
            plgpu.barrier_wait(self.scratch.aside.at[self.number])
            self._finish(spot, sums)
            return done

        lax.fori_loop(0, rounds, one_tile, jnp.int32(0))
        plgpu.wait_smem_to_gmem(0)

    def _product(self, spot: Spot, done: jax.Array, *sums: Any) -> list[jax.Array]:
        tile, steps, scratch = self.problem.tile, sum(self.problem.steps), self.scratch

        def multiply(step: jax.Array) -> None:
            slot = lax.rem(step, tile.stages)
            plgpu.barrier_wait(scratch.ready.at[slot])
            weights = scratch.columns.at[slot]
            for piece, sum_ref in enumerate(sums):
                rows = scratch.rows[1].at[slot, pl.ds(self.number * tile.rows + piece * PIECE, PIECE)]
                plgpu.wgmma(sum_ref, rows, weights if self.problem.dtype.itemsize == 2 else weights.T)

        def next_step(step: jax.Array, _: None) -> None:
            multiply(step)
            plgpu.wgmma_wait(tile.pieces)  # of the step before, whose slot nobody reads any more
            plgpu.barrier_arrive(scratch.free.at[lax.rem(step - 1, tile.stages)])

        multiply(done)
        # Not at once: it waits until what the tile before has stored was read.
        later = done + min(steps, 1 + STEPS_BEFORE_ASIDE)
        lax.fori_loop(done + 1, later, next_step, None)
        self._fetch_aside(spot)
        lax.fori_loop(later, done + steps, next_step, None)
        return [each[...] for each in sums]

    def _fetch_aside(self, spot: Spot) -> None:
        """Starts the copies of all that is needed beside the product."""
        vectors, heights, aside = (
            each.at[self.number] for each in (self.scratch.vectors, self.scratch.heights, self.scratch.aside)
        )
        out, tables = (view.at[self.number] for view in self.scratch.out)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # of the tile before
        plgpu.copy_gmem_to_smem(self.bias.at[spot.columns], vectors.at[0], aside)
        extra = list(self.extra)
        if self.scaled:
            of_columns, of_rows = extra.pop(0), extra.pop(0)
            plgpu.copy_gmem_to_smem(of_columns.at[spot.columns], vectors.at[1], aside)
            rows = pl.ds(self.problem.first_row + spot.first, self.problem.tile.rows)
            plgpu.copy_gmem_to_smem(of_rows.at[spot.row, rows], heights.at[0], aside)
        if isinstance(self.after, Heads):
            plgpu.copy_gmem_to_smem(extra[0].at[spot.which], vectors.at[2], aside)
            for index, table in enumerate(extra[1:]):
                plgpu.copy_gmem_to_smem(table.at[pl.ds(spot.first, PIECE)], tables.at[index], aside)
        elif isinstance(self.after, Added):
            plgpu.copy_gmem_to_smem(extra[0].at[spot.row, spot.columns], vectors.at[2], aside)
            for piece, panel in self._panels:
                source = spot.panel(extra[1], piece, panel, self.problem.panel)
                plgpu.copy_gmem_to_smem(source, out.at[piece, panel], aside)
        elif isinstance(self.after, Hidden):
            rows = pl.ds(spot.first, self.problem.tile.rows)
            plgpu.copy_gmem_to_smem(extra[0].at[spot.row, rows], heights.at[1], aside)

    def _finish(self, spot: Spot, sums: Sequence[jax.Array]) -> None:
        """Does what follows the product and stores it."""
        out_smem, _ = (view.at[self.number] for view in self.scratch.out)
        for piece, y in enumerate(sums):
            for panel, z in enumerate(self._followed(spot, piece, self._whole(piece, y))):
                out_smem.at[piece, panel][...] = stored(z, self.problem.out_dtype)
        plgpu.commit_smem()

        def store(out: Any) -> None:
            for piece, panel in self._panels:
                target = spot.panel(out, piece, panel, self.problem.panel)
                plgpu.copy_smem_to_gmem(out_smem.at[piece, panel], target)

        if len(self.outs) == 1:
            store(self.outs[0])
        else:
            for number, out in enumerate(self.outs):
                pl.when(spot.which == number)(functools.partial(store, out))

    def _whole(self, piece: int, y: jax.Array) -> jax.Array:
        vectors = self.scratch.vectors.at[self.number]
        if self.scaled:
            y = y * self._height(0, piece, y) * over_rows(vectors.at[1])
        return y + over_rows(vectors.at[0])

    def _height(self, which: int, piece: int, y: jax.Array) -> jax.Array:
        """Numbers along the rows, over the columns of y."""
        heights = self.scratch.heights.at[self.number, which, pl.ds(piece * PIECE, PIECE)]
        return lax.broadcast_in_dim(load(heights, plgpu.Layout.WGMMA.reduce(1)), y.shape, [0])

    def _followed(self, spot: Spot, piece: int, y: jax.Array) -> list[jax.Array]:
        """Panels of the result."""
        after, vectors, width = self.after, self.scratch.vectors.at[self.number], self.problem.panel
        out_smem, tables = (view.at[self.number] for view in self.scratch.out)
        if isinstance(after, Heads):
            # Values take the same way and come out as they were. Three ways would keep the sums in registers beside
            # what is made of them, and there is no room for both.
            value = lax.div(spot.which, 2).astype(jnp.float32)
            heads = heads_normed(y, over_rows(vectors.at[2]), after.epsilon, value)
            if after.turn is None:
                return [panel for head in heads for panel in cut(head, width)]
            cos, sin = (load(tables.at[index], plgpu.Layout.WGMMA) for index in range(2))
            plgpu.commit_smem()  # all have read them: what is stored takes their place
            cos, sin = cos * (1.0 - value) + value, sin * (1.0 - value)
            return [panel for head in heads for panel in rotated(head, cos, sin)]
        if isinstance(after, Added):
            old = [load(out_smem.at[piece, panel], plgpu.Layout.WGMMA) for panel in range(self.problem.panels)]
            gated = cut(over_rows(vectors.at[2]) * y, width)
            return [a.astype(jnp.float32) + b for a, b in zip(old, gated, strict=True)]
        if isinstance(after, Hidden):
            return cut(after.activation(y) * self._height(1, piece, y), width)
        return cut(after(y) if after else y, width)

    @property
    def _panels(self) -> list[tuple[int, int]]:
        pieces, panels = self.problem.tile.pieces, self.problem.panels
        return [(piece, panel) for piece in range(pieces) for panel in range(panels)]
