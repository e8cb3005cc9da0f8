"""Queries, keys and values in 8 bits, as the kernel of `flash_fp8_sm90.py` wants them: rounded, padded with zeros and
laid out by XLA.

One scale for each head; keys without their mean, or what is near it: the softmax does not see what all keys have in
common (Zhang et al. 2024, SageAttention, section 4.2).

B batch, N queries, M keys, H heads, D head width; Np and Mp: N and M padded to whole blocks.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from osjax.kernels.flash_sm90 import CONSUMERS, ROWS

E4M3 = jnp.float8_e4m3fn
SMALLEST_SCALE = 1e-36  # keeps 0 / scale and scale · -inf from being NaN
GROUP = 16  # keys within which `lane_order` permutes
SAMPLED = 8  # of so many keys, one counts for the mean


class Operands(NamedTuple):
    """What the kernel multiplies; of the Mp keys and values those past M are zeros."""

    q_bnhd: jax.Array  # e4m3 [B, Np, H, D]
    k_bmhd: jax.Array  # e4m3 [B, Mp, H, D] less the mean, keys in `lane_order`
    v_bhdm: jax.Array  # e4m3 [B, H, D, Mp]
    log2_scale_bh: jax.Array  # float32: of the scores, times log2(e), as exp2 is the GPU's own
    v_scale_bh: jax.Array  # float32


def rounded(q_bnhd: jax.Array, k_bmhd: jax.Array, v_bmhd: jax.Array, scale: float, *, block_keys: int) -> Operands:
    """What the kernel multiplies for queries [B, N, H, D], keys and values [B, M, H, D]. scale: of the scores."""
    q_bnhd, q_scale_bh = rounded_by_head(q_bnhd)
    k_bmhd, k_scale_bh = centred_by_head(k_bmhd)
    v_bmhd, v_scale_bh = rounded_by_head(v_bmhd)
    k_bmhd, v_bmhd = _padded(k_bmhd, block_keys), _padded(v_bmhd, block_keys)
    q_bnhd = _padded(q_bnhd, CONSUMERS * ROWS)
    v_bhdm = v_bmhd.transpose(0, 2, 3, 1)
    log2_scale_bh = jnp.maximum(q_scale_bh * k_scale_bh * (scale * math.log2(math.e)), SMALLEST_SCALE)
    return Operands(q_bnhd, lane_order(k_bmhd), v_bhdm, log2_scale_bh, v_scale_bh)


def rounded_by_head(x_bnhd: jax.Array) -> tuple[jax.Array, jax.Array]:
    """[B, N, H, D] in e4m3, and the scale of each head by which it is to be multiplied: float32 [B, H]."""
    x_bnhd = x_bnhd.astype(jnp.float32)
    return _rounded(x_bnhd, jnp.abs(x_bnhd).max(axis=(1, 3)))


def centred_by_head(x_bnhd: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`rounded_by_head` of what is left without the mean over N; its largest number is known without another pass."""
    x_bnhd = x_bnhd.astype(jnp.float32)
    mean_bhd, least_bhd, most_bhd = x_bnhd[:, ::SAMPLED].mean(axis=1), x_bnhd.min(axis=1), x_bnhd.max(axis=1)
    return _rounded(x_bnhd - mean_bhd[:, None], jnp.maximum(most_bhd - mean_bhd, mean_bhd - least_bhd).max(axis=-1))


def _rounded(x_bnhd: jax.Array, peak_bh: jax.Array) -> tuple[jax.Array, jax.Array]:
    scale_bh = jnp.maximum(peak_bh / float(jnp.finfo(E4M3).max), SMALLEST_SCALE)
    return (x_bnhd * (1.0 / scale_bh)[:, None, :, None]).astype(E4M3), scale_bh


def _padded(x_bnhd: jax.Array, multiple: int) -> jax.Array:
    return jnp.pad(x_bnhd, ((0, 0), (0, -x_bnhd.shape[1] % multiple), (0, 0), (0, 0)))


def lane_order(k_bmhd: jax.Array) -> jax.Array:
    """Keys in the order in which a lane finds the weights of four neighbours where wgmma wants them.

    In a row of scores, lane l of 4 holds of every 16 columns 2l, 2l + 1, 8 + 2l and 9 + 2l. As the left operand of an
    8-bit product it is to hold columns 4l to 4l + 3. So column 8a + 2l + j gets key 4l + 2a + j.
    """
    batch, keys, heads, width = k_bmhd.shape
    grouped = k_bmhd.reshape(batch, keys // GROUP, 4, 2, 2, heads, width)
    return grouped.swapaxes(2, 3).reshape(k_bmhd.shape)


def key_of(column: jax.Array) -> jax.Array:
    """Which key of its block stands in that column of the scores: int32, as `lane_order` has it."""
    return (column & ~14) + (column & 6) * 2 + (column & 8) // 4
