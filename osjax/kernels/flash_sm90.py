"""Flash attention for Hopper GPUs (compute capability 9.0) as one Pallas Mosaic-GPU kernel. Forward only, non-causal.

One CUDA block computes 128 query rows of one head with three warpgroups. A producer feeds key and value blocks into a
ring in shared memory through the copy engine (TMA). Two consumers own 64 query rows each and keep scores, weights and
output in registers, with the running maximum and sum of the online softmax (Dao et al. 2022, algorithm 1). Two overlaps
keep the tensor cores busy (Shah et al. 2024, FlashAttention-3, sections 3.1 and 3.2): the consumers take turns, so that
one multiplies while the other is in its softmax; and a consumer issues the scores of block i together with the output
of block i - 1, so that its softmax runs beside its own second product too.

B batch, N queries, M keys, H heads, D head width. Measured speed: docs/performance.md, section Attention.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from osjax.errors import OsjaxError
from osjax.kernels.hopper import CONSUMER_REGISTERS, PRODUCER_REGISTERS, SHARED_BYTES

ROWS = 64  # query rows of one consumer: the rows of a wgmma instruction
CONSUMERS = 2
PANEL = 64  # columns of a shared-memory panel: 128 bytes of a 16-bit type, the widest swizzle
OTHER_SHARED_BYTES = 1024  # barriers and log-sum-exp
TILE_REGISTERS = 208  # the most that scores, weights and output may take of a consumer's before it spills


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How many keys of head width `width` make a block, and how many blocks the ring holds; checks itself.

    Raises OsjaxError for sizes that wgmma cannot multiply or that a Hopper multiprocessor cannot hold.
    """

    width: int
    keys: int
    stages: int = 2

    def __post_init__(self) -> None:
        if self.width not in (64, 128):
            raise OsjaxError(f"attention pallas knows head widths 64 and 128, not {self.width}: use --attention auto")
        if self.keys < 64 or self.keys % 64 or self.stages < 2:
            raise OsjaxError(f"{self} cannot be pipelined: keys must be a multiple of 64 and stages at least 2")
        if self.shared_bytes > SHARED_BYTES or self.tile_registers > TILE_REGISTERS:
            raise OsjaxError(
                f"{self} needs {self.shared_bytes} bytes of shared memory and {self.tile_registers} registers: "
                f"take fewer keys or stages, {SHARED_BYTES} and {TILE_REGISTERS} are the most"
            )

    @property
    def panels(self) -> int:
        return self.width // PANEL

    @property
    def shared_bytes(self) -> int:
        return 2 * self.width * (CONSUMERS * ROWS + 2 * self.stages * self.keys) + OTHER_SHARED_BYTES

    @property
    def tile_registers(self) -> int:
        """Per thread of a consumer: float32 scores and output, 16-bit weights, 64 rows over 128 threads."""
        return self.keys // 2 + self.keys // 4 + self.width // 2


MEASURED_BEST = {64: Blocks(width=64, keys=128), 128: Blocks(width=128, keys=192)}


class Scratch(NamedTuple):
    """Shared memory of a block. `ready` barriers: the copy engine is done; `free`: both consumers are."""

    tiles: Any  # ((q, k, v) to copy into, the same memory as (q, k, v) to multiply from)
    lse: Any
    q_ready: Any
    k_ready: Any
    v_ready: Any
    k_free: Any
    v_free: Any
    turn: Any


@dataclasses.dataclass(frozen=True)
class KeyBlocks:
    """How many keys there are, and in which blocks; `dtype` of the result."""

    blocks: Any  # `Blocks`, or what else has `keys` and `stages`
    keys: int
    dtype: jnp.dtype

    @property
    def steps(self) -> int:
        return pl.cdiv(self.keys, self.blocks.keys)

    @property
    def last_keys(self) -> int:
        """True keys in the last block."""
        return self.keys - (self.steps - 1) * self.blocks.keys


@dataclasses.dataclass(frozen=True)
class Problem(KeyBlocks):
    """What is fixed when the kernel is traced. `log2_scale`: softmax scale · log2(e), as exp2 is the GPU's own."""

    log2_scale: float

    def scratch(self) -> Scratch:
        """Tiles are stacks of panels. Only one panel of a row is contiguous, so that rows need no grouping by eight.

        The copy engine takes a panel as [rows, 64]; wgmma wants it cut into 8 × 64 tiles. In a panel both are the same
        order of bytes, hence two views of one memory; all sizes are multiples of the alignment, so they coincide.
        """
        blocks = self.blocks
        ring = (blocks.stages, blocks.panels, blocks.keys, PANEL)
        shapes = [(CONSUMERS, blocks.panels, ROWS, PANEL), ring, ring]
        swizzle, tiling = plgpu.SwizzleTransform(128), plgpu.TilingTransform((8, PANEL))

        def view(*transforms: Any) -> tuple:
            return tuple(plgpu.SMEM(shape, self.dtype, transforms=transforms) for shape in shapes)

        copies = blocks.panels  # every panel's copy arrives once
        return Scratch(
            tiles=plgpu.RefUnion(view(swizzle), view(tiling, swizzle)),
            lse=plgpu.SMEM((CONSUMERS, ROWS), jnp.float32),
            q_ready=plgpu.Barrier(num_arrivals=copies, num_barriers=CONSUMERS),
            k_ready=plgpu.Barrier(num_arrivals=copies, num_barriers=blocks.stages),
            v_ready=plgpu.Barrier(num_arrivals=copies, num_barriers=blocks.stages),
            k_free=plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=blocks.stages),
            v_free=plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=blocks.stages),
            turn=plgpu.Barrier(num_barriers=CONSUMERS),
        )


def flash_attention(
    q_bnhd: jax.Array,
    k_bmhd: jax.Array,
    v_bmhd: jax.Array,
    *,
    scale: float | None = None,
    blocks: Blocks | None = None,
) -> jax.Array:
    """softmax(q k^T · scale) v over all keys; shapes and result as `reference_attention`.

    q [B, N, H, D], k and v [B, M, H, D], all bfloat16 or all float16; D 64 or 128, any N and M from 1 on. `scale` is
    positive, 1/sqrt(D) by default; `blocks` the measured best. Returns [B, N, H, D] in q's dtype. Raises OsjaxError.
    """
    return flash_attention_lse(q_bnhd, k_bmhd, v_bmhd, scale=scale, blocks=blocks)[0]


def flash_attention_lse(
    q_bnhd: jax.Array,
    k_bmhd: jax.Array,
    v_bmhd: jax.Array,
    *,
    scale: float | None = None,
    blocks: Blocks | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`flash_attention`, and the natural log of each row's sum of exponentials, float32 [B, H, N]."""
    check_inputs(q_bnhd, k_bmhd, v_bmhd, scale)
    batch, queries, heads, width = q_bnhd.shape
    scale = 1.0 / math.sqrt(width) if scale is None else scale
    blocks = blocks or MEASURED_BEST.get(width) or Blocks(width=width, keys=64)  # the last refuses the width
    if blocks.width != width:
        raise OsjaxError(f"{blocks} is for another head width than {width}: leave blocks out")
    problem = Problem(blocks, k_bmhd.shape[1], q_bnhd.dtype, scale * math.log2(math.e))
    tiles = pl.cdiv(queries, CONSUMERS * ROWS)

    def flash_sm90(q_gmem: Any, k_gmem: Any, v_gmem: Any, out_gmem: Any, lse_gmem: Any, scratch: Scratch) -> None:
        head, tile, row = (lax.axis_index(name) for name in ("head", "tile", "batch"))
        warpgroup = lax.axis_index("warpgroup")

        def rows(consumer: jax.Array | int) -> pl.Slice:
            return pl.ds((tile * CONSUMERS + consumer) * ROWS, ROWS)

        @pl.when(warpgroup == CONSUMERS)
        def _producer() -> None:
            plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")
            produce(problem, [q_gmem.at[row, rows(c), head] for c in range(CONSUMERS)],
                    k_gmem.at[row, :, head], v_gmem.at[row, :, head], scratch)  # fmt: skip

        @pl.when(warpgroup < CONSUMERS)
        def _consumer() -> None:
            plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")
            own = rows(warpgroup)
            consume(problem, warpgroup, out_gmem.at[row, own, head], lse_gmem.at[row, head, own], scratch)

    # TMA clips what is past the end of `out`, but wants rows of whole 16 bytes: log-sum-exp is padded and cut.
    lse_type = jax.ShapeDtypeStruct((batch, heads, tiles * CONSUMERS * ROWS), jnp.float32)
    out_type = [jax.ShapeDtypeStruct(q_bnhd.shape, q_bnhd.dtype), lse_type]
    out, lse = launched(flash_sm90, out_type, problem.scratch(), (heads, tiles, batch))(q_bnhd, k_bmhd, v_bmhd)
    return out, lse[:, :, :queries]


def launched(kernel: Callable, out_type: Any, scratch: Any, grid: tuple[int, int, int]) -> Callable:
    """The kernel in a block of three warpgroups for every (head, tile of 128 queries, row of the batch)."""
    return plgpu.kernel(
        kernel,
        out_type=out_type,
        scratch_types=[scratch],
        # Heads vary fastest: when all blocks on the GPU read the same keys at once, the L2 cache becomes the limit.
        grid=grid,
        grid_names=("head", "tile", "batch"),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        # Row reductions are shuffles inside a warp; the default scratch for them would not fit.
        compiler_params=plgpu.CompilerParams(
            approx_math=True, reduction_scratch_bytes=128, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
    )


def check_inputs(q_bnhd: jax.Array, k_bmhd: jax.Array, v_bmhd: jax.Array, scale: float | None) -> None:
    batch, queries, heads, width = q_bnhd.shape
    keys = k_bmhd.shape[1]
    if {k_bmhd.shape, v_bmhd.shape} != {(batch, keys, heads, width)} or not (batch and queries and keys and heads):
        raise OsjaxError(
            f"attention takes q [B, N, H, D] and k, v [B, M, H, D], not {q_bnhd.shape}, {k_bmhd.shape}, "
            f"{v_bmhd.shape}: give non-empty arrays that agree in B, H and D"
        )
    dtypes = {x.dtype.name for x in (q_bnhd, k_bmhd, v_bmhd)}
    if dtypes not in ({"bfloat16"}, {"float16"}):
        raise OsjaxError(f"attention pallas takes all bfloat16 or all float16, not {', '.join(sorted(dtypes))}: cast")
    if scale is not None and not scale > 0:
        raise OsjaxError(f"attention pallas takes a positive softmax scale, not {scale}: negate q instead")


def copy_panels(gmem: Any, smem: Any, ready: Any) -> None:
    """Starts the copies of a [rows, D] slice into its panels; past the end of the array they write zeros."""
    for panel in range(smem.shape[0]):
        plgpu.copy_gmem_to_smem(gmem.at[:, pl.ds(panel * PANEL, PANEL)], smem.at[panel], ready)


def produce(problem: Problem, q_gmem: list, k_gmem: Any, v_gmem: Any, scratch: Scratch) -> None:
    """The producer: copies both consumers' queries, then key and value blocks, from the last to the first.

    The last block, the only one that may be partial, goes first: its mask then stays outside the consumers' loop.
    """
    (q_smem, k_smem, v_smem), _ = scratch.tiles
    for consumer in range(CONSUMERS):
        copy_panels(q_gmem[consumer], q_smem.at[consumer], scratch.q_ready.at[consumer])

    def refill(gmem: Any, smem: Any, ready: Any) -> Callable:
        return lambda keys, slot: copy_panels(gmem.at[keys], smem.at[slot], ready.at[slot])

    refill_k, refill_v = refill(k_gmem, k_smem, scratch.k_ready), refill(v_gmem, v_smem, scratch.v_ready)
    fill_ring(problem, [(refill_k, scratch.k_free), (refill_v, scratch.v_free)])


def fill_ring(problem: KeyBlocks, rings: list[tuple[Callable, Any]]) -> None:
    """For every block, from the last to the first, and ring: waits until a slot is free, then refill(keys, slot)."""
    blocks = problem.blocks

    @pl.loop(0, problem.steps)
    def _feed(step: jax.Array) -> None:
        slot = lax.rem(step, blocks.stages)
        keys = pl.ds((problem.steps - 1 - step) * blocks.keys, blocks.keys)
        for refill, free in rings:
            pl.when(step >= blocks.stages)(functools.partial(plgpu.barrier_wait, free.at[slot]))
            refill(keys, slot)


def consume(problem: Problem, consumer: jax.Array, out_gmem: Any, lse_gmem: Any, scratch: Scratch) -> None:
    """A consumer: attention of its 64 query rows over all key blocks, written to `out_gmem` and `lse_gmem`."""
    blocks = problem.blocks
    (out_smem, _, _), (q_smem, k_smem, v_smem) = scratch.tiles
    out_smem, q_smem, lse_smem = out_smem.at[consumer], q_smem.at[consumer], scratch.lse.at[consumer]
    scores_type = plgpu.ACC((ROWS, blocks.keys), jnp.float32)

    def score(scores_ref: Any, slot: jax.Array | int) -> None:
        for panel in range(blocks.panels):
            plgpu.wgmma(scores_ref, q_smem.at[panel], k_smem.at[slot, panel].T)

    def accumulate(out_refs: tuple, weights: jax.Array, slot: jax.Array | int) -> None:
        for panel, out_ref in enumerate(out_refs):
            plgpu.wgmma(out_ref, weights, v_smem.at[slot, panel])

    @pl.when(consumer == 1)
    def _let_the_other_begin() -> None:
        plgpu.barrier_arrive(scratch.turn.at[0])

    plgpu.barrier_wait(scratch.q_ready.at[consumer])
    plgpu.barrier_wait(scratch.k_ready.at[0])

    def first_scores(scores_ref: Any) -> jax.Array:
        score(scores_ref, 0)
        return scores_ref[...]

    scores = pl.run_scoped(first_scores, scores_type)
    plgpu.barrier_arrive(scratch.k_free.at[0])
    if problem.last_keys < blocks.keys:
        column = plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=plgpu.Layout.WGMMA)
        scores = jnp.where(column < problem.last_keys, scores, -jnp.inf)
    first_peak = scores.max(axis=1) * problem.log2_scale
    weights = jnp.exp2(scores * problem.log2_scale - over_columns(first_peak, blocks.keys))
    first_total, first_weights = weights.sum(axis=1), weights.astype(problem.dtype)

    def attend(*out_refs: Any) -> tuple[list[jax.Array], jax.Array, jax.Array]:
        def step(index: jax.Array, carry: tuple) -> tuple:
            peak, total, weights = carry
            slot, previous = lax.rem(index, blocks.stages), lax.rem(index - 1, blocks.stages)
            plgpu.barrier_wait(scratch.k_ready.at[slot])
            plgpu.barrier_wait(scratch.turn.at[consumer])

            def multiply(scores_ref: Any) -> jax.Array:
                score(scores_ref, slot)
                plgpu.barrier_wait(scratch.v_ready.at[previous])
                accumulate(out_refs, weights, previous)
                plgpu.barrier_arrive(scratch.turn.at[CONSUMERS - 1 - consumer])
                # The output's products, one for each panel, stay in flight during the softmax.
                return plgpu.wgmma_accumulator_load(scores_ref, wait_n=blocks.panels)

            scores = pl.run_scoped(multiply, scores_type)
            plgpu.barrier_arrive(scratch.k_free.at[slot])
            new_peak = jnp.maximum(peak, scores.max(axis=1) * problem.log2_scale)
            shrink = jnp.exp2(peak - new_peak)
            weights = jnp.exp2(scores * problem.log2_scale - over_columns(new_peak, blocks.keys))
            total = total * shrink + weights.sum(axis=1)
            outs = [out_ref[...] for out_ref in out_refs]
            plgpu.barrier_arrive(scratch.v_free.at[previous])
            for out_ref, out in zip(out_refs, outs, strict=True):
                out_ref[...] = out * over_columns(shrink, PANEL)
            return new_peak, total, weights.astype(problem.dtype)

        peak, total, weights = lax.fori_loop(1, problem.steps, step, (first_peak, first_total, first_weights))
        last = (problem.steps - 1) % blocks.stages
        plgpu.barrier_wait(scratch.v_ready.at[last])
        accumulate(out_refs, weights, last)
        return [out_ref[...] for out_ref in out_refs], peak, total

    out_type = plgpu.ACC((ROWS, PANEL), jnp.float32)
    outs, peak, total = pl.run_scoped(attend, *[out_type] * blocks.panels)
    for panel, out in enumerate(outs):
        q_smem.at[panel][...] = (out * over_columns(1.0 / total, PANEL)).astype(problem.dtype)
    lse_smem[...] = peak * math.log(2.0) + jnp.log(total)
    plgpu.commit_smem()
    for panel in range(blocks.panels):
        plgpu.copy_smem_to_gmem(out_smem.at[panel], out_gmem.at[:, pl.ds(panel * PANEL, PANEL)])
    plgpu.copy_smem_to_gmem(lse_smem, lse_gmem)
    plgpu.wait_smem_to_gmem(0)


def over_columns(x_r: jax.Array, columns: int) -> jax.Array:
    """[R] → [R, columns], each row its value."""
    return lax.broadcast_in_dim(x_r, (x_r.shape[0], columns), [0])
