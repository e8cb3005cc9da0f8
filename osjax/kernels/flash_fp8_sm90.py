"""Flash attention in 8 bits for Hopper GPUs (compute capability 9.0) as one Pallas Mosaic-GPU kernel.

The kernel of `flash_sm90.py` with both products in float8 e4m3, which the tensor cores multiply twice as fast as
16-bit floats. XLA rounds queries, keys and values just before (`flash_fp8_operands.py`). Weights are rounded in
registers, times 2^8, so that they use the range of e4m3 (Shah et al. 2024, FlashAttention-3, section 3.3).

What that costs: e4m3 has 3 bits of mantissa, half a unit in its last place is 2^-4 of a number at most and 2^-5.2 in
the root mean square. A weight is off by that for its own rounding, and by 2^-4.7 times the spread (standard deviation)
of a row's scores for those of q and k; the output by both and the rounding of values, 5e-2 of its norm where the spread
is 1. Tensor cores of Hopper keep some 14 bits of the sums of 8-bit products, which beside this does not show.

B batch, N queries, M keys, H heads, D head width; Np and Mp: N and M padded to whole blocks.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu

from osjax.errors import OsjaxError
from osjax.kernels.flash_fp8_operands import E4M3, Operands, key_of, rounded
from osjax.kernels.flash_sm90 import (
    CONSUMERS,
    ROWS,
    TILE_REGISTERS,
    KeyBlocks,
    check_inputs,
    fill_ring,
    launched,
    over_columns,
)
from osjax.kernels.hopper import CONSUMER_REGISTERS, PRODUCER_REGISTERS, SHARED_BYTES

WIDTH = 128  # of a head: as bytes, a row of the widest swizzle
OUT_PANEL = 64  # columns of the result that are 128 bytes
OTHER_SHARED_BYTES = 1024  # barriers
LOG2_LARGEST_WEIGHT = 8.0  # 256; the largest e4m3 is 448


@dataclasses.dataclass(frozen=True)
class Blocks8:
    """How many keys make a block, and how many blocks the ring holds; checks itself.

    Raises OsjaxError for sizes that wgmma cannot multiply or that a Hopper multiprocessor cannot hold.
    """

    keys: int
    stages: int = 2

    def __post_init__(self) -> None:
        if self.keys < 32 or self.keys % 32 or self.keys > 256 or self.stages < 2:
            raise OsjaxError(f"{self} cannot be pipelined: keys must be 32, 64, … 256 and stages at least 2")
        if self.shared_bytes > SHARED_BYTES or self.tile_registers > TILE_REGISTERS:
            raise OsjaxError(
                f"{self} needs {self.shared_bytes} bytes of shared memory and {self.tile_registers} registers: "
                f"take fewer keys or stages, {SHARED_BYTES} and {TILE_REGISTERS} are the most"
            )

    @property
    def swizzle(self) -> int:
        """Of the values' rows, which are as long as the block: 128, 64 or 32 bytes."""
        return math.gcd(self.keys, 128)

    @property
    def shared_bytes(self) -> int:
        return WIDTH * (CONSUMERS * ROWS * (1 + 2) + 2 * self.stages * self.keys) + OTHER_SHARED_BYTES

    @property
    def tile_registers(self) -> int:
        """Per thread of a consumer: float32 scores and output, 8-bit weights, 64 rows over 128 threads."""
        return self.keys // 2 + self.keys // 8 + WIDTH // 2


MEASURED_BEST = Blocks8(keys=192)  # of three on long sequences (docs/performance.md, section 8 bits)


class Scratch(NamedTuple):
    """Shared memory of a block. `ready` barriers: the copy engine is done; `free`: both consumers are."""

    q: Any
    k: Any
    v: Any
    out: Any  # (to copy from, the same memory to store into)
    q_ready: Any
    k_ready: Any
    v_ready: Any
    k_free: Any
    v_free: Any
    turn: Any


def scratch_of(problem: KeyBlocks) -> Scratch:
    """Inputs are padded to whole tiles. Rows of `out` past the end are clipped by the copy engine, which then must not
    group them by eight, hence two views, as in `flash_sm90.py`."""
    blocks = problem.blocks

    def tiles(shape: tuple[int, ...], dtype: jnp.dtype, swizzle: int = 128) -> Any:
        tiling = plgpu.TilingTransform((8, swizzle // jnp.dtype(dtype).itemsize))
        return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(swizzle)))

    out = (CONSUMERS, WIDTH // OUT_PANEL, ROWS, OUT_PANEL)
    copied = plgpu.SMEM(out, problem.dtype, transforms=(plgpu.SwizzleTransform(128),))
    return Scratch(
        q=tiles((CONSUMERS, ROWS, WIDTH), E4M3),
        k=tiles((blocks.stages, blocks.keys, WIDTH), E4M3),
        v=tiles((blocks.stages, WIDTH, blocks.keys), E4M3, blocks.swizzle),
        out=plgpu.RefUnion(copied, tiles(out, problem.dtype)),
        q_ready=plgpu.Barrier(num_barriers=CONSUMERS),
        k_ready=plgpu.Barrier(num_barriers=blocks.stages),
        v_ready=plgpu.Barrier(num_barriers=blocks.stages),
        k_free=plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=blocks.stages),
        v_free=plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=blocks.stages),
        turn=plgpu.Barrier(num_barriers=CONSUMERS),
    )


def flash_attention_fp8(
    q_bnhd: jax.Array,
    k_bmhd: jax.Array,
    v_bmhd: jax.Array,
    *,
    scale: float | None = None,
    blocks: Blocks8 | None = None,
) -> jax.Array:
    """softmax(q k^T · scale) v over all keys, multiplied in float8 e4m3; shapes as `reference_attention`.

    q [B, N, H, D], k and v [B, M, H, D], all bfloat16 or all float16; D 128, any N and M from 1 on. `scale` is
    positive, 1/sqrt(D) by default; `blocks` the measured best. Returns [B, N, H, D] in q's dtype, as exact as
    the head of this module says; an input that is not finite may spoil its whole head. Raises OsjaxError.
    """
    check_inputs(q_bnhd, k_bmhd, v_bmhd, scale)
    if (width := q_bnhd.shape[3]) != WIDTH:
        raise OsjaxError(f"attention in 8 bits knows head width {WIDTH}, not {width}: use --attention auto")
    blocks = blocks or MEASURED_BEST
    scale = 1.0 / math.sqrt(width) if scale is None else scale
    operands = rounded(q_bnhd, k_bmhd, v_bmhd, scale, block_keys=blocks.keys)
    return attend(operands, q_bnhd, k_bmhd.shape[1], blocks)


def attend(operands: Operands, like_bnhd: jax.Array, keys: int, blocks: Blocks8) -> jax.Array:
    """The kernel: attention over `keys` true keys, shaped and typed `like_bnhd`."""
    batch, queries, heads, _ = like_bnhd.shape
    problem = KeyBlocks(blocks, keys, like_bnhd.dtype)

    def flash_fp8_sm90(q_gmem, k_gmem, v_gmem, log2_scale_gmem, v_scale_gmem, out_gmem, scratch: Scratch) -> None:
        head, tile, row, warpgroup = (lax.axis_index(name) for name in ("head", "tile", "batch", "warpgroup"))

        def rows(consumer: jax.Array | int) -> pl.Slice:
            return pl.ds((tile * CONSUMERS + consumer) * ROWS, ROWS)

        @pl.when(warpgroup == CONSUMERS)
        def _producer() -> None:
            plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
            produce(problem, [q_gmem.at[row, rows(c), head] for c in range(CONSUMERS)],
                    k_gmem.at[row, :, head], v_gmem.at[row, head], scratch)  # fmt: skip

        @pl.when(warpgroup < CONSUMERS)
        def _consumer() -> None:
            plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
            consumer = Consumer(problem, warpgroup, log2_scale_gmem[row, head], scratch)
            consumer.consume(v_scale_gmem[row, head], out_gmem.at[row, rows(warpgroup), head])

    grid = (heads, pl.cdiv(queries, CONSUMERS * ROWS), batch)
    out_type = jax.ShapeDtypeStruct(like_bnhd.shape, like_bnhd.dtype)
    return launched(flash_fp8_sm90, out_type, scratch_of(problem), grid)(*operands)


def produce(problem: KeyBlocks, q_gmem: list, k_gmem: Any, v_gmem: Any, scratch: Scratch) -> None:
    """The producer: copies both consumers' queries, then key and value blocks, from the last to the first."""
    for consumer in range(CONSUMERS):
        plgpu.copy_gmem_to_smem(q_gmem[consumer], scratch.q.at[consumer], scratch.q_ready.at[consumer])

    def refill_k(keys: pl.Slice, slot: jax.Array) -> None:
        plgpu.copy_gmem_to_smem(k_gmem.at[keys], scratch.k.at[slot], scratch.k_ready.at[slot])

    def refill_v(keys: pl.Slice, slot: jax.Array) -> None:
        plgpu.copy_gmem_to_smem(v_gmem.at[:, keys], scratch.v.at[slot], scratch.v_ready.at[slot])

    fill_ring(problem, [(refill_k, scratch.k_free), (refill_v, scratch.v_free)])


@dataclasses.dataclass(frozen=True)
class Consumer:
    """A consumer: attention of its 64 query rows over all key blocks."""

    problem: KeyBlocks
    number: jax.Array
    log2_scale: jax.Array
    scratch: Scratch

    def consume(self, v_scale: jax.Array, out_gmem: Any) -> None:
        """Writes the output to `out_gmem`."""
        out, total = pl.run_scoped(self._attend, plgpu.ACC((ROWS, WIDTH), jnp.float32))
        out = out * over_columns(v_scale / total, WIDTH)
        copied, stored = (view.at[self.number] for view in self.scratch.out)
        starts = range(0, WIDTH, OUT_PANEL)
        for panel, start in enumerate(starts):
            stored.at[panel][...] = out[:, start : start + OUT_PANEL].astype(self.problem.dtype)
        plgpu.commit_smem()
        for panel, start in enumerate(starts):
            plgpu.copy_smem_to_gmem(copied.at[panel], out_gmem.at[:, pl.ds(start, OUT_PANEL)])
        plgpu.wait_smem_to_gmem(0)

    def _attend(self, out_ref: Any) -> tuple[jax.Array, jax.Array]:
        """Sums weighted values into `out_ref`; returns them, and float32 sums of a row's weights before rounding."""
        problem, scratch, stages = self.problem, self.scratch, self.problem.blocks.stages

        def step(index: jax.Array, carry: tuple) -> tuple:
            peak, total, weights = carry
            slot, previous = lax.rem(index, stages), lax.rem(index - 1, stages)

            def behind_scores() -> None:
                self._accumulate(out_ref, weights, previous)
                plgpu.barrier_arrive(scratch.turn.at[CONSUMERS - 1 - self.number])

            plgpu.barrier_wait(scratch.turn.at[self.number])
            scores = self._scores(slot, behind_scores, wait_n=1)
            new_peak = jnp.maximum(peak, self._peak(scores))
            shrink = jnp.exp2(peak - new_peak)
            weights = self._weights(scores, new_peak)
            total = total * shrink + weights.sum(axis=1)
            # Waits for the output's product, which reads the weights before: those of this step are rounded, into the
            # same registers, only afterwards.
            out = out_ref[...]
            plgpu.barrier_arrive(scratch.v_free.at[previous])
            out_ref[...] = out * over_columns(shrink, WIDTH)
            return new_peak, total, as_left_operand(weights)

        first = self._first_block()
        _, total, weights = lax.fori_loop(1, problem.steps, step, first)
        self._accumulate(out_ref, weights, (problem.steps - 1) % stages)
        return out_ref[...], total

    def _first_block(self) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Peak, total and weights of the first block, the only one that may be partial."""
        problem, scratch = self.problem, self.scratch

        let_the_other_begin = functools.partial(plgpu.barrier_arrive, scratch.turn.at[0])
        pl.when(self.number == 1)(let_the_other_begin)
        plgpu.barrier_wait(scratch.q_ready.at[self.number])
        scores = self._scores(0, lambda: None, wait_n=0)
        if problem.last_keys < problem.blocks.keys:
            key = key_of(plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=plgpu.Layout.WGMMA))
            scores = jnp.where(key < problem.last_keys, scores, -jnp.inf)
        peak = self._peak(scores)
        weights = self._weights(scores, peak)
        return peak, weights.sum(axis=1), as_left_operand(weights)

    def _scores(self, slot: jax.Array | int, issue_more: Callable[[], None], wait_n: int) -> jax.Array:
        """[64, keys]: waits for their product, but not for `wait_n` that `issue_more` starts behind it."""
        plgpu.barrier_wait(self.scratch.k_ready.at[slot])

        def multiply(scores_ref: Any) -> jax.Array:
            plgpu.wgmma(scores_ref, self.scratch.q.at[self.number], self.scratch.k.at[slot].T)
            issue_more()
            return plgpu.wgmma_accumulator_load(scores_ref, wait_n=wait_n)

        scores = pl.run_scoped(multiply, plgpu.ACC((ROWS, self.problem.blocks.keys), jnp.float32))
        plgpu.barrier_arrive(self.scratch.k_free.at[slot])
        return scores

    def _accumulate(self, out_ref: Any, weights: jax.Array, slot: jax.Array | int) -> None:
        """Starts the product of weights and values."""
        plgpu.barrier_wait(self.scratch.v_ready.at[slot])
        plgpu.wgmma(out_ref, weights, self.scratch.v.at[slot].T)

    def _peak(self, scores: jax.Array) -> jax.Array:
        """[64]: what is to be subtracted so that the largest weight is 2^8."""
        return scores.max(axis=1) * self.log2_scale - LOG2_LARGEST_WEIGHT

    def _weights(self, scores: jax.Array, peak: jax.Array) -> jax.Array:
        return jnp.exp2(scores * self.log2_scale - over_columns(peak, self.problem.blocks.keys))


def as_left_operand(weights: jax.Array) -> jax.Array:
    """Weights [64, keys] rounded to e4m3, keys put in order: what `lane_order` did is undone without a move."""

    @plgpu.inline_mgpu(
        arg_types=(plgpu.Layout.WGMMA,),
        return_type=plgpu.ShapeDtypeStruct(weights.shape, E4M3, layout=plgpu.Layout.WGMMA_8BIT),
    )
    def relabel(_: Any, weights: mgpu.FragmentedArray) -> mgpu.FragmentedArray:
        pairs = weights.astype(mgpu.utils.dtype_to_ir_type(E4M3)).registers  # [1, keys / 8, …]
        joined = np.empty_like(pairs[:, ::2])
        for index in np.ndindex(joined.shape):
            joined[index] = mgpu.utils.vector_concat([pairs[:, ::2][index], pairs[:, 1::2][index]])
        return mgpu.FragmentedArray(_registers=joined, _layout=mgpu.WGMMA_LAYOUT_8BIT, _is_signed=None)

    return relabel(weights)
