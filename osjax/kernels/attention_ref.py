"""The reference attention: plain JAX, float32 softmax, any device. Every other implementation is compared with it.

B batch, N queries, M keys, H heads, D head width.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

# Above this many scores per call the queries are worked off in chunks, so that the reference stays usable on a laptop.
MAX_SCORES = 1 << 26


def reference_attention(
    q_bnhd: jax.Array, k_bmhd: jax.Array, v_bmhd: jax.Array, *, scale: float | None = None
) -> jax.Array:
    """softmax(q k^T · scale) v over all keys, non-causal (Vaswani et al. 2017, eq. 1).

    q [B, N, H, D], k and v [B, M, H, D], any float dtype; `scale` defaults to 1/sqrt(D).
    Returns [B, N, H, D] in q's dtype; scores and softmax are float32.
    """
    batch, queries, heads, width = q_bnhd.shape
    scale = 1.0 / math.sqrt(width) if scale is None else scale

    def attend(q_bnhd: jax.Array) -> jax.Array:
        scores_bhnm = jnp.einsum("bnhd,bmhd->bhnm", q_bnhd, k_bmhd, preferred_element_type=jnp.float32) * scale
        weights_bhnm = jax.nn.softmax(scores_bhnm, axis=-1).astype(v_bmhd.dtype)
        return jnp.einsum("bhnm,bmhd->bnhd", weights_bhnm, v_bmhd, preferred_element_type=jnp.float32).astype(
            q_bnhd.dtype
        )

    rows = max(1, MAX_SCORES // (batch * heads * k_bmhd.shape[1]))
    if queries <= rows:
        return attend(q_bnhd)
    chunks = -(-queries // rows)
    padded = jnp.pad(q_bnhd, ((0, 0), (0, chunks * rows - queries), (0, 0), (0, 0)))
    chunked = jnp.moveaxis(padded.reshape(batch, chunks, rows, heads, width), 1, 0)
    out = jnp.moveaxis(jax.lax.map(attend, chunked), 0, 1)
    return out.reshape(batch, chunks * rows, heads, width)[:, :queries]
