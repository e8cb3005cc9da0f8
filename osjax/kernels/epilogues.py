"""What follows a product in `osjax/kernels/matmul_sm90.py`: what it needs, and how it is done to a tile in registers.

B batch, M rows (tokens), N output features, R rows of a tile.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import mosaic_gpu as plgpu

PIECE = 64  # rows of a wgmma instruction
HEAD = 128  # the head width that `Heads` knows: that of the tiles' columns, or half of it


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


class Hidden(NamedTuple):
    """After the product: what a hidden layer makes of it, rounded to float8 e4m3. inverse_bm: float32, what its rows
    are multiplied by before, so that they do not exceed the type's largest number."""

    activation: Callable[[jax.Array], jax.Array]
    inverse_bm: jax.Array


class Scales(NamedTuple):
    """What 8-bit inputs and weights are multiplied by, float32: rows_bm of the inputs, columns_n of the weights."""

    rows_bm: jax.Array
    columns_n: jax.Array


After = Heads | Added | Hidden | Callable[[jax.Array], jax.Array] | None


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
