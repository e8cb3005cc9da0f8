"""Rotary position embedding over (t, h, w) positions, on half-split pairs.

B batch (or 1), N tokens, D head width, H heads. RoFormer (Su et al. 2021), section 3.4, one frequency band per axis.

The FLUX release rotates interleaved pairs (2i, 2i+1), Open-Sora v2 half-split ones (i, i + D/2). Attention does not see
the order of channels within a head, so the converter permutes FLUX's q and k rows and this is the only layout here.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Rope(NamedTuple):
    """Rotation of each token: cos and sin, both float32 [B or 1, N, D/2]."""

    cos_bnd: jax.Array
    sin_bnd: jax.Array


def rope_table(ids_bna: np.ndarray, axes_dim: tuple[int, ...], theta: float) -> Rope:
    """Angles position · theta^(-2i/d) for each axis of width d, axes concatenated.

    ids [B, N, A] integer positions, `axes_dim` the A even widths that sum to the head width. Computed on the host in
    float64 (a device would use float32, off by 1e-5 at position 100) and returned as float32 [B, N, D/2].
    """
    ids_bna = np.asarray(ids_bna, np.float64)
    angles = [
        ids_bna[..., axis, None] * theta ** (-np.arange(0, width, 2, dtype=np.float64) / width)
        for axis, width in enumerate(axes_dim)
    ]
    angles_bnd = np.concatenate(angles, axis=-1)
    return Rope(np.cos(angles_bnd).astype(np.float32), np.sin(angles_bnd).astype(np.float32))


def after_text(rope: Rope, text_length: int) -> Rope:
    """The table of the joint sequence: in front of the image, text tokens at position zero, which is no rotation."""
    front = ((0, 0), (text_length, 0), (0, 0))
    return Rope(jnp.pad(rope.cos_bnd, front, constant_values=1.0), jnp.pad(rope.sin_bnd, front))


def rotate(x_bnhd: jax.Array, rope: Rope) -> jax.Array:
    """Rotates the pairs (i, i + D/2) of every head; float32 inside, x's dtype out. x [B, N, H, D]."""
    cos, sin = rope.cos_bnd[:, :, None, :], rope.sin_bnd[:, :, None, :]
    first, second = jnp.split(x_bnhd.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x_bnhd.dtype)
