"""3D convolution for Hopper GPUs (compute capability 9.0) as one Pallas Mosaic-GPU kernel: an implicit matrix product.

One CUDA block computes tiles of several frames × a box of pixels × output channels, one tile after another, with three
warpgroups. A producer feeds two rings in shared memory through the copy engine (TMA), one of input frames [pixels, 64
channels], one of weights [64, columns]. Two consumers keep their part of the output in registers and feed the tensor
cores. Were frames computed one by one, the way from the L2 cache would be the limit: 64 bytes a clock for each
multiprocessor. So in a step, one tap (kh, kw) and 64 channels, the block loads frames + kd - 1 input frames and kd
weights once, and multiplies every output frame with its kd of them, which takes less than half of that.

The copy engine writes zeros for what lies outside of an array and drops what would be stored there, so that frames,
pixels and channels need not divide into tiles.

B batch, T frames, H height, W width, C input channels, O output channels; kd, kh, kw sizes of the kernel.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from osjax.errors import OsjaxError
from osjax.kernels.conv_tiles import CONSUMERS, PANEL, ROWS, Tiles, default_tiles
from osjax.kernels.hopper import CONSUMER_REGISTERS, PRODUCER_REGISTERS, multiprocessors

ALIGNED = 8  # channels: the copy engine wants rows of whole 16 bytes


class Ring(NamedTuple):
    """Barriers of a ring's slots: the copy engine has filled one; both consumers are done with it."""

    ready: Any
    free: Any


class Scratch(NamedTuple):
    """Shared memory of a block."""

    tiles: Any  # ((frames, out) to copy, the same memory as (frames, out) to compute with)
    weights: Any
    bias: Any
    frame_ring: Ring
    weight_ring: Ring
    bias_ready: Any
    residual_ready: Any


class Place(NamedTuple):
    """Where a tile begins in the output."""

    batch: jax.Array
    frame: jax.Array
    row: jax.Array
    column: jax.Array
    channel: jax.Array


@dataclasses.dataclass(frozen=True)
class Problem:
    """What is fixed when the kernel is traced. `kernel`: (kd, kh, kw); `out`: (B, T, H, W, O)."""

    tiles: Tiles
    kernel: tuple[int, int, int]
    channels: int
    out: tuple[int, int, int, int, int]
    dtype: jnp.dtype

    @property
    def loads(self) -> int:
        """Input frames of one step."""
        return self.tiles.frames + self.kernel[0] - 1

    @property
    def steps(self) -> int:
        """Of one tile."""
        return self.kernel[1] * self.kernel[2] * pl.cdiv(self.channels, PANEL)

    @property
    def size(self) -> tuple[int, int, int, int, int]:
        """Of a tile along the output's axes."""
        return 1, self.tiles.frames, self.tiles.height, self.tiles.width, self.tiles.columns

    @property
    def grid(self) -> tuple[int, ...]:
        """Tiles along the output's axes."""
        return tuple(pl.cdiv(whole, part) for whole, part in zip(self.out, self.size, strict=True))

    def place(self, index: jax.Array) -> Place:
        """Of a tile. Channels vary fastest, then width: blocks that run at the same time read the same pixels."""
        along = []
        for count, part in zip(self.grid[::-1], self.size[::-1], strict=True):
            along.append(lax.rem(index, count) * part)
            index = lax.div(index, count)
        return Place(*along[::-1])

    def scratch(self) -> Scratch:
        """Frames and output are seen twice: the copy engine takes [height, width, 64], wgmma 8 × 64 tiles of a matrix.

        Both are the same order of bytes. The output goes panel by panel, as the copy engine takes no wider rows.
        """
        tiles, swizzle, tiling = self.tiles, plgpu.SwizzleTransform(128), plgpu.TilingTransform((8, PANEL))

        def view(pixels: tuple[int, ...], own: tuple[int, ...], *transforms: Any) -> tuple:
            shapes = (tiles.frame_slots, *pixels, PANEL), (CONSUMERS, tiles.panels, *own, PANEL)
            return tuple(plgpu.SMEM(shape, self.dtype, transforms=transforms) for shape in shapes)

        def ring(slots: int) -> Ring:
            free = plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=slots)
            return Ring(ready=plgpu.Barrier(num_barriers=slots), free=free)

        to_copy = view((tiles.height, tiles.width), (tiles.height // tiles.halves, tiles.width), swizzle)
        return Scratch(
            tiles=plgpu.RefUnion(to_copy, view((tiles.pixels,), (ROWS,), tiling, swizzle)),
            weights=plgpu.SMEM((tiles.weight_slots, PANEL, tiles.columns), self.dtype, transforms=(tiling, swizzle)),
            bias=plgpu.SMEM((CONSUMERS, tiles.columns), jnp.float32),
            frame_ring=ring(tiles.frame_slots),
            weight_ring=ring(tiles.weight_slots),
            bias_ready=plgpu.Barrier(num_barriers=CONSUMERS),
            residual_ready=plgpu.Barrier(num_arrivals=tiles.panels, num_barriers=CONSUMERS),
        )


def conv3d(
    x_bthwc: jax.Array,
    kernel_dhwio: jax.Array,
    bias_o: jax.Array | None = None,
    residual_bthwo: jax.Array | None = None,
    *,
    tiles: Tiles | None = None,
) -> jax.Array:
    """The valid convolution of an already padded input, plus bias, plus residual; sums in float32.

    x [B, T + kd - 1, H + kh - 1, W + kw - 1, C], kernel [kd, kh, kw, C, O] and residual [B, T, H, W, O], all bfloat16
    or all float16; bias [O]. `tiles`: left out, a default. Returns [B, T, H, W, O] in x's dtype. Raises OsjaxError.
    """
    wanted = _check_inputs(x_bthwc, kernel_dhwio, bias_o, residual_bthwo)
    tiles = tiles or default_tiles(wanted[1], wanted[-1])
    x, weights = _padded(x_bthwc, {4: ALIGNED}), _padded(kernel_dhwio, {3: ALIGNED, 4: tiles.columns})
    bias = jnp.zeros(wanted[-1:]) if bias_o is None else bias_o.astype(jnp.float32)
    # Weights lose dims: the copy engine knows five, and two more come in when it cuts a matrix into 8 × 64 tiles.
    operands = [x, weights.reshape(-1, *weights.shape[3:]), _padded(bias, {0: tiles.columns})]
    if residual_bthwo is not None:
        operands.append(_padded(residual_bthwo, {4: ALIGNED}))
    out_type = jax.ShapeDtypeStruct((*wanted[:4], pl.cdiv(wanted[4], ALIGNED) * ALIGNED), x.dtype)
    problem = Problem(tiles, kernel_dhwio.shape[:3], x.shape[-1], out_type.shape, x.dtype)
    count = math.prod(problem.grid)
    blocks = min(multiprocessors(), count)

    def conv_sm90(x_gmem: Any, weights_gmem: Any, bias_gmem: Any, *rest: Any) -> None:
        *residual_gmem, out_gmem, scratch = rest
        block, warpgroup = lax.axis_index("block"), lax.axis_index("warpgroup")
        turns = lax.div(count - 1 - block, blocks) + 1

        @pl.when(warpgroup == CONSUMERS)
        def _producer() -> None:
            plgpu.set_max_registers(PRODUCER_REGISTERS, action="decrease")

            @pl.loop(0, turns)
            def _tile(turn: jax.Array) -> None:
                produce(problem, turn, problem.place(block + turn * blocks), x_gmem, weights_gmem, scratch)

        @pl.when(warpgroup < CONSUMERS)
        def _consumer() -> None:
            plgpu.set_max_registers(CONSUMER_REGISTERS, action="increase")

            @pl.loop(0, turns)
            def _tile(turn: jax.Array) -> None:
                place = problem.place(block + turn * blocks)
                bias = bias_gmem.at[pl.ds(place.channel, tiles.columns)]
                plgpu.copy_gmem_to_smem(bias, scratch.bias.at[warpgroup], scratch.bias_ready.at[warpgroup])
                sums = consume(problem, turn, warpgroup, scratch)
                finish(problem, sums, place, warpgroup, residual_gmem, out_gmem, scratch)

            plgpu.wait_smem_to_gmem(0)

    out = plgpu.kernel(
        conv_sm90,
        out_type=out_type,
        scratch_types=[problem.scratch()],
        grid=(blocks,),
        grid_names=("block",),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            reduction_scratch_bytes=128,  # nothing is reduced; the default would not fit
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
    )(*operands)
    return out[..., : wanted[4]]


def _check_inputs(x: jax.Array, kernel: jax.Array, bias: jax.Array | None, residual: jax.Array | None) -> tuple:
    """Returns the output's shape."""
    if x.ndim != 5 or kernel.ndim != 5 or x.shape[4] != kernel.shape[3]:
        raise OsjaxError(
            f"a convolution takes [B, T, H, W, C] and [kd, kh, kw, C, O], not {x.shape} and {kernel.shape}: "
            "give arrays that agree in C"
        )
    thw = (whole - part + 1 for whole, part in zip(x.shape[1:4], kernel.shape[:3], strict=True))
    out = (x.shape[0], *thw, kernel.shape[4])
    if min(*out, *kernel.shape) < 1:
        raise OsjaxError(f"a kernel of {kernel.shape} leaves nothing of {x.shape}: pad the input")
    for extra, shape in ((bias, out[4:]), (residual, out)):
        if extra is not None and extra.shape != shape:
            raise OsjaxError(f"a convolution to {out} cannot add {extra.shape}: give bias or residual of shape {shape}")
    dtypes = {array.dtype.name for array in (x, kernel, residual) if array is not None}
    if dtypes not in ({"bfloat16"}, {"float16"}):
        raise OsjaxError(f"the convolution takes all bfloat16 or all float16, not {', '.join(sorted(dtypes))}: cast")
    return out


def _padded(x: jax.Array, multiples: dict[int, int]) -> jax.Array:
    """With zeros at the end of some axes, to multiples."""
    ends = [-x.shape[axis] % multiples.get(axis, 1) for axis in range(x.ndim)]
    return jnp.pad(x, [(0, end) for end in ends]) if any(ends) else x


def produce(problem: Problem, turn: jax.Array, place: Place, x_gmem: Any, weights_gmem: Any, scratch: Scratch) -> None:
    """The producer: copies the input frames and weights of one tile, in the order in which they are needed."""
    tiles, (times, height, width) = problem.tiles, problem.kernel
    (frames_smem, _), _ = scratch.tiles

    def refill(count: jax.Array, gmem: Any, smem: Any, ring: Ring) -> None:
        slot = lax.rem(count, smem.shape[0])
        pl.when(count >= smem.shape[0])(lambda: plgpu.barrier_wait(ring.free.at[slot]))
        plgpu.copy_gmem_to_smem(gmem, smem.at[slot], ring.ready.at[slot])

    @pl.loop(0, problem.steps)
    def _feed(step: jax.Array) -> None:
        at = turn * problem.steps + step
        tap, channels = lax.rem(step, height * width), pl.ds(lax.div(step, height * width) * PANEL, PANEL)
        rows = pl.ds(place.row + lax.div(tap, width), tiles.height)
        columns = pl.ds(place.column + lax.rem(tap, width), tiles.width)
        for load in range(problem.loads):
            frame = x_gmem.at[place.batch, place.frame + load, rows, columns, channels]
            refill(at * problem.loads + load, frame, frames_smem, scratch.frame_ring)
            time = load - (tiles.frames - 1)
            if time >= 0:
                matrix = time * height * width + tap
                weights = weights_gmem.at[matrix, channels, pl.ds(place.channel, tiles.columns)]
                refill(at * times + time, weights, scratch.weights, scratch.weight_ring)


def consume(problem: Problem, turn: jax.Array, consumer: jax.Array, scratch: Scratch) -> list[jax.Array]:
    """A consumer: the sums of its frames and pixels of one tile, float32 [64, columns] each."""
    tiles, times = problem.tiles, problem.kernel[0]
    _, (frames_smem, _) = scratch.tiles
    first_frame, first_pixel = (consumer * tiles.own_frames, 0) if tiles.halves == 1 else (0, consumer * ROWS)

    def frame_slot(step: jax.Array | int, load: jax.Array | int) -> jax.Array:
        return lax.rem((turn * problem.steps + step) * problem.loads + load, tiles.frame_slots)

    def weight_slot(step: jax.Array | int, time: int) -> jax.Array:
        return lax.rem((turn * problem.steps + step) * times + time, tiles.weight_slots)

    def release(step: jax.Array | int, time: int) -> None:
        """What is not needed after this time."""
        for load in range(time, problem.loads if time == times - 1 else time + 1):
            plgpu.barrier_arrive(scratch.frame_ring.free.at[frame_slot(step, load)])
        plgpu.barrier_arrive(scratch.weight_ring.free.at[weight_slot(step, time)])

    def multiply(*sum_refs: Any) -> list[jax.Array]:
        @pl.loop(0, problem.steps)
        def _step(step: jax.Array) -> None:
            for time in range(times):
                # A thread must not skip a turn of a barrier: both consumers wait for all frames, used or not.
                for load in range(time + tiles.frames - 1 if time else 0, time + tiles.frames):
                    plgpu.barrier_wait(scratch.frame_ring.ready.at[frame_slot(step, load)])
                slot = weight_slot(step, time)
                plgpu.barrier_wait(scratch.weight_ring.ready.at[slot])
                for own, sum_ref in enumerate(sum_refs):
                    frame = frames_smem.at[frame_slot(step, first_frame + own + time), pl.ds(first_pixel, ROWS)]
                    plgpu.wgmma(sum_ref, frame, scratch.weights.at[slot])
                plgpu.wgmma_wait(len(sum_refs))  # these stay in flight; the ones before are done
                if time:
                    release(step, time - 1)
                else:
                    pl.when(step > 0)(lambda: release(step - 1, times - 1))

        return [sum_ref[...] for sum_ref in sum_refs]

    sums = pl.run_scoped(multiply, *[plgpu.ACC((ROWS, tiles.columns), jnp.float32)] * tiles.own_frames)
    release(problem.steps - 1, times - 1)
    return sums


def finish(
    problem: Problem, sums: list, place: Place, consumer: jax.Array, residual: list, out_gmem: Any, scratch: Scratch
) -> None:
    """Adds bias and residual, if there is one, to a consumer's sums and stores them; the last store is not awaited."""
    tiles = problem.tiles
    (_, out_copy), (_, out_smem) = scratch.tiles
    out_copy, out_smem, bias_smem = out_copy.at[consumer], out_smem.at[consumer], scratch.bias.at[consumer]
    height = tiles.height // tiles.halves
    first_frame, first_row = (consumer * tiles.own_frames, 0) if tiles.halves == 1 else (0, consumer * height)

    def panel_of(gmem: Any, frame: int, panel: int) -> Any:
        rows, columns = pl.ds(place.row + first_row, height), pl.ds(place.column, tiles.width)
        channels = pl.ds(place.channel + panel * PANEL, PANEL)
        return gmem.at[place.batch, place.frame + first_frame + frame, rows, columns, channels]

    plgpu.barrier_wait(scratch.bias_ready.at[consumer])
    for frame, sum_rc in enumerate(sums):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)  # the frame before has left the memory that this one takes
        for gmem in residual:
            ready = scratch.residual_ready.at[consumer]
            for panel in range(tiles.panels):
                plgpu.copy_gmem_to_smem(panel_of(gmem, frame, panel), out_copy.at[panel], ready)
            plgpu.barrier_wait(ready)
        for panel in range(tiles.panels):
            bias = plgpu.layout_cast(bias_smem[pl.ds(panel * PANEL, PANEL)], plgpu.Layout.WGMMA.reduce(0))
            total = sum_rc[:, panel * PANEL : (panel + 1) * PANEL] + lax.broadcast_in_dim(bias, (ROWS, PANEL), [1])
            if residual:
                total = total + out_smem.at[panel][...].astype(jnp.float32)
            out_smem.at[panel][...] = total.astype(problem.dtype)
        plgpu.commit_smem()
        for panel in range(tiles.panels):
            plgpu.copy_smem_to_gmem(out_copy.at[panel], panel_of(out_gmem, frame, panel))
