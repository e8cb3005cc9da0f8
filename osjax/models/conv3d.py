"""Pieces of 3D convolutional networks over videos [B, T, H, W, C]: convolutions, upsampling, norm.

Frames at full resolution are gigabytes. So convolutions take what is done to each element before them, and add what is
added after them, and a large array is worked through a few frames at a time.
"""

from __future__ import annotations

import abc
import functools
import itertools
import math
from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from osjax.kernels.convolution import Convolution, xla_convolution

Model = TypeVar("Model", bound=nnx.Module)
Factors = tuple[int, int, int]  # of time, height, width
Borders = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]  # in front of and behind time, height, width
Elementwise = Callable[[jax.Array], jax.Array]

TIME = 1
AT_ONCE = 5 * 2**28  # elements that a convolution may make of its input, or upsampling in all; else it goes by parts


def _same(x: jax.Array) -> jax.Array:
    return x


class VideoConv(nnx.Conv):
    """A convolution that sees no later frame, of stride 1 or not; what kinds of it have in common.

    border_mode: of the border, as in `pad_border`; convolve: does those of stride 1, see `convolved_by`.
    """

    border_mode: str
    stride: Factors
    convolve: Convolution

    def __call__(
        self, x_bthwc: jax.Array, residual_bthwo: jax.Array | None = None, before: Elementwise = _same
    ) -> jax.Array:
        """The convolution of before(x), plus residual; before: of each element by itself, whatever the other frames."""
        kernel_dhwio = self._kernel(x_bthwc.shape[TIME]).astype(self.dtype)
        back, strided = kernel_dhwio.shape[0] - 1, max(self.stride) > 1
        convolve = functools.partial(xla_convolution, strides=self.stride) if strided else self.convolve

        def frames(x_bthwc: jax.Array, start: int, count: int) -> jax.Array:
            seen = x_bthwc[:, max(0, start - back) : start + count]
            borders = ((max(0, back - start), 0), *self._borders())
            padded = pad_border(seen, borders, self.border_mode, lambda x: before(x).astype(self.dtype))
            residual = None if residual_bthwo is None else residual_bthwo[:, start : start + count]
            return convolve(padded, kernel_dhwio, self.bias.astype(self.dtype), residual)

        if strided:
            return frames(x_bthwc, 0, x_bthwc.shape[TIME])
        return _in_turn(frames, x_bthwc, x_bthwc.size)

    def of_upsampled(self, x_bthwc: jax.Array, factors: Factors) -> jax.Array:
        """The convolution of x with every element repeated by the factors, but the first frame only in height and
        width, so that T frames become 1 + (T - 1)·factor: what strided causal convolutions do to the length, undone.

        The repeated array is not made. Of an upsampled axis, outputs of one phase see the same few elements, each
        through several taps: with sums of taps they are a smaller convolution of x itself.
        """
        kernel_dhwio = self._kernel(x_bthwc.shape[TIME]).astype(jnp.float32)
        time = factors[0] if x_bthwc.shape[TIME] > 1 else 1
        factors = time, *factors[1:]
        borders = (kernel_dhwio.shape[0] - 1, 0), *self._borders()
        axes = [
            _phases(size, front, factor)
            for size, (front, _), factor in zip(kernel_dhwio.shape[:3], borders, factors, strict=True)
        ]
        sides = [(-min(each.first for each in axis), max(each.last for each in axis)) for axis in axes]
        phases = list(itertools.product(*axes))
        kernels = [_merged(kernel_dhwio, phase).astype(self.dtype) for phase in phases]
        bias_o = self.bias.astype(self.dtype)
        (back, _), *around = sides

        def frames(x_bthwc: jax.Array, start: int, count: int) -> jax.Array:
            seen = x_bthwc[:, max(0, start - back) : start + count].astype(self.dtype)
            padded = pad_border(seen, ((max(0, back - start), 0), *around), self.border_mode)
            sizes = count, *x_bthwc.shape[2:4]
            parts = []
            for phase, kernel in zip(phases, kernels, strict=True):
                window = padded
                for axis, (each, (front, _), size) in enumerate(zip(phase, sides, sizes, strict=True), TIME):
                    begin = front + each.first
                    window = jax.lax.slice_in_dim(window, begin, begin + size + len(each.taps) - 1, axis=axis)
                parts.append(self.convolve(window, kernel, bias_o, None))
            out = _interleaved(parts, factors)
            return out if start else out[:, time - 1 :]

        return _in_turn(frames, x_bthwc, math.prod(factors) * x_bthwc.size, time)

    @abc.abstractmethod
    def _kernel(self, frames: int) -> jax.Array:
        """[kd, kh, kw, C, O], for a video of so many frames."""

    @abc.abstractmethod
    def _borders(self) -> tuple[tuple[int, int], tuple[int, int]]:
        """In front of and behind height, width."""


class CausalConv3D(VideoConv):
    """A cubic convolution whose border repeats: k // 2 on each side of height and width, k - 1 in front of time.

    A length n becomes ceil(n / stride) for odd k, so 1 + 4·n frames halve twice to 1 + n.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        size: int = 3,
        stride: Factors = (1, 1, 1),
        *,
        rngs: nnx.Rngs,
        dtype: jnp.dtype = jnp.float32,
    ):
        super().__init__(
            c_in, c_out, (size,) * 3, strides=stride, padding="VALID", dtype=dtype, param_dtype=dtype, rngs=rngs
        )
        self.border_mode, self.stride, self.convolve = "edge", stride, xla_convolution

    def _kernel(self, frames: int) -> jax.Array:
        """All taps in time see the only frame of a picture: their sum does in one pass what they do in three."""
        kernel = self.kernel[...]
        return kernel.sum(axis=0, keepdims=True, dtype=jnp.float32) if frames == 1 else kernel

    def _borders(self) -> tuple[tuple[int, int], tuple[int, int]]:
        side = self.kernel_size[1] // 2
        return (side, side), (side, side)


def convolved_by(model: Model, convolve: Convolution) -> Model:
    """A copy that shares the arrays, whose convolutions over videos with stride 1 are done by `convolve`."""
    other = jax.tree.map(_same, model)
    for _, module in nnx.iter_modules(other):
        if isinstance(module, VideoConv):
            module.convolve = convolve
    return other


def pad_border(x_bthwc: jax.Array, borders: Borders, mode: str, before: Elementwise = _same) -> jax.Array:
    """before(x) with a border: of zeros ("constant"), or repeating its edge ("edge").

    Edges are written over a border of zeros, which XLA makes in the pass that computes before(x), and in place. They
    are computed once more: if they were read from where they go, XLA would copy it all.
    """
    y = before(x_bthwc)
    if not any(map(any, borders)):
        return y
    y = jax.lax.pad(y, jnp.zeros((), y.dtype), [(0, 0, 0), *((*border, 0) for border in borders), (0, 0, 0)])
    if mode == "constant":
        return y
    for axis, (front, behind) in enumerate(borders, TIME):
        done = (*borders[: axis - TIME], *((0, 0),) * (len(borders) - axis + TIME))
        starts = [0] * axis + [border[0] for border in borders[axis - TIME :]] + [0]
        for at, count, source in ((0, front, 0), (y.shape[axis] - behind, behind, x_bthwc.shape[axis] - 1)):
            if count:
                edge = pad_border(jax.lax.slice_in_dim(x_bthwc, source, source + 1, axis=axis), done, mode, before)
                starts[axis] = at
                y = jax.lax.dynamic_update_slice(y, jnp.repeat(edge, count, axis), starts)
    return y


class GroupNorm(nnx.GroupNorm):
    """GroupNorm over (T, H, W, C / groups) of [B, T, H, W, C], computed in float32 whatever the dtype.

    x is read once for both sums: of itself, and of squared differences from a guess, the mean of the first frame.
    Whatever x is, that guess is off by no more than sqrt(T - 1) standard deviations, so the variance loses no more than
    a few bits to cancellation.
    """

    def __call__(self, x_bthwc: jax.Array) -> jax.Array:
        return self.fitted(x_bthwc)(x_bthwc)

    def fitted(self, x_bthwc: jax.Array) -> Elementwise:
        """What the norm does to x, for any of its frames."""
        b, c = x_bthwc.shape[0], x_bthwc.shape[-1]
        count = x_bthwc[0].size // self.num_groups

        def per_group(x_bc: jax.Array) -> jax.Array:
            return x_bc.reshape(b, self.num_groups, -1)

        def per_element(x_bg: jax.Array) -> jax.Array:
            return jnp.repeat(x_bg, c // self.num_groups, axis=1).reshape(b, 1, 1, 1, c)

        guess_bg = per_group(x_bthwc[:, 0].mean((1, 2), dtype=jnp.float32)).mean(-1)
        guess_bg = jax.lax.stop_gradient(guess_bg)  # neither mean nor variance depend on it

        def mean(x_bthwc: jax.Array) -> jax.Array:
            return per_group(x_bthwc.sum((1, 2, 3))).sum(-1) / count

        # Of x, not of differences: what two sums read, a compiler may take for an array worth keeping.
        mean_bg = mean(x_bthwc.astype(jnp.float32))
        squares_bg = mean(jnp.square(x_bthwc.astype(jnp.float32) - per_element(guess_bg)))
        variance_bg = jnp.maximum(squares_bg - jnp.square(mean_bg - guess_bg), 0.0)
        center = per_element(mean_bg)
        factor = per_element(jax.lax.rsqrt(variance_bg + self.epsilon)) * self.scale[...].astype(jnp.float32)
        bias_c = self.bias[...].astype(jnp.float32)
        return lambda x: ((x.astype(jnp.float32) - center) * factor + bias_c).astype(self.dtype)


def group_norm(channels: int, groups: int, *, rngs: nnx.Rngs, dtype: jnp.dtype) -> GroupNorm:
    """The norm of autoencoders, eps 1e-6."""
    return GroupNorm(channels, groups, epsilon=1e-6, dtype=dtype, param_dtype=dtype, rngs=rngs)


class _Phase(NamedTuple):
    """Outputs of one phase along one axis: each sees the elements from `first` on, relative to its own, through so many
    taps each."""

    first: int
    taps: tuple[int, ...]

    @property
    def last(self) -> int:
        return self.first + len(self.taps) - 1


def _phases(size: int, front: int, factor: int) -> list[_Phase]:
    """Of an axis that is repeated by the factor, where an output sees `size` elements from `front` before it."""
    found = []
    for phase in range(factor):
        sources = [(phase + tap - front) // factor for tap in range(size)]
        taps = tuple(sources.count(source) for source in range(sources[0], sources[-1] + 1))
        found.append(_Phase(sources[0], taps))
    return found


def _merged(kernel_dhwio: jax.Array, phases: tuple[_Phase, ...]) -> jax.Array:
    """The kernel of a phase: taps that see the same element summed."""
    for axis, phase in enumerate(phases):
        ends = list(itertools.accumulate(phase.taps))
        parts = [
            jax.lax.slice_in_dim(kernel_dhwio, end - count, end, axis=axis).sum(axis, keepdims=True)
            for end, count in zip(ends, phase.taps, strict=True)
        ]
        kernel_dhwio = jnp.concatenate(parts, axis)
    return kernel_dhwio


def _interleaved(parts: list[jax.Array], factors: Factors) -> jax.Array:
    """Phases of (time, height, width), width varying fastest, each [B, T, H, W, C], as one array."""
    for axis, factor in zip((3, 2, 1), factors[::-1], strict=True):
        if factor > 1:
            groups = [parts[start : start + factor] for start in range(0, len(parts), factor)]
            parts = [_interleaved_along(axis, group) for group in groups]
    return parts[0]


def _interleaved_along(axis: int, parts: list[jax.Array]) -> jax.Array:
    shape = list(parts[0].shape)
    shape[axis] *= len(parts)
    return jnp.stack(parts, axis + 1).reshape(shape)


def _in_turn(
    frames: Callable[[jax.Array, int, int], jax.Array], x_bthwc: jax.Array, elements: int, factor: int = 1
) -> jax.Array:
    """frames(x, start, count) of all frames of x, joined; if they make too many elements, half as many at a time.

    factor: output frames of an input frame, but the first makes one. The last part may begin in the one before, so that
    all have one shape.
    """
    total = x_bthwc.shape[TIME]
    if elements <= AT_ONCE or total == 1:
        return frames(x_bthwc, 0, total)
    count = -(-total // -(-2 * elements // AT_ONCE))
    out = None
    for start in range(0, total, count):
        start = min(start, total - count)
        part = frames(x_bthwc, start, count)
        if out is None:
            out = jnp.zeros((part.shape[0], 1 + (total - 1) * factor, *part.shape[2:]), part.dtype)
        at = max(0, start * factor - factor + 1)
        out = jax.lax.dynamic_update_slice_in_dim(out, part, at, TIME)
        x_bthwc, out = jax.lax.optimization_barrier((x_bthwc, out))  # the next part waits for this one
    return out
