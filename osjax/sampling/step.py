"""One step of the denoising loop, compiled as a whole: forward passes of the branches, their sum, an Euler step.

B batch, N image tokens, L text tokens, C channels of a token, P pooled-text width, K guidance branches.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from osjax.kernels.attention import Attention
from osjax.models.mmdit import JointAttention, MMDiT
from osjax.models.operations import BY_XLA, Operations
from osjax.models.rope import Rope
from osjax.parallel.specs import SPECS
from osjax.parallel.ulysses import JointSequence, ulysses_attention
from osjax.sampling.caching import Kept, cached_forward


class Branches(NamedTuple):
    """What differs between guidance branches, stacked over K; `cond` is None for a model without conditions."""

    txt_kblc: jax.Array
    vec_kbp: jax.Array
    cond_kbnc: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Where:
    """Where the loop runs: the mesh, the attention of one device, and how blocks multiply there. Hashable, so it keys
    the compiled step."""

    mesh: Mesh
    attend: Attention
    operations: Operations = BY_XLA


# Inside a step: the guided sum of velocities so far, what is kept of every branch, and how many were computed in full.
_Carry = tuple[jax.Array, Kept | None, jax.Array]


@functools.partial(jax.jit, static_argnames=("sequence", "where"), donate_argnames=("x_bnc", "cache"))
def euler_step(
    model: MMDiT,
    x_bnc: jax.Array,
    branches: Branches,
    rope: Rope,
    weights_kn: jax.Array,
    order_k: jax.Array,
    count: jax.Array,
    level: jax.Array,
    next_level: jax.Array,
    guidance_b: jax.Array | None,
    cache: Kept | None = None,
    limit: jax.Array | None = None,
    valid_bn: jax.Array | None = None,
    *,
    sequence: JointSequence,
    where: Where,
) -> tuple[jax.Array, jax.Array, Kept | None, jax.Array]:
    """One compiled step for any number of branches: a loop over the first `count` of `order_k`.

    Returns the latents after it; whether these are finite, if they are not, the latents are those before it; what is
    kept for the next step, if anything is; and how many branches were computed in full. cache, limit, valid_bn: of step
    caching, each as in `cached_forward` but with all branches in front; None without it.
    """
    forward = _sharded_forward(
        sequence, where, branches.cond_kbnc is not None, guidance_b is not None, cache is not None
    )
    time_b = jnp.full(x_bnc.shape[:1], level, jnp.float32)

    def add_branch(j: jax.Array, carry: _Carry) -> _Carry:
        total_bnc, cache, computed = carry
        one, kept = jax.tree.map(
            lambda a: jax.lax.dynamic_index_in_dim(a, order_k[j], keepdims=False), (branches, cache)
        )
        velocity_bnc, kept, full = forward(
            model, kept, limit, valid_bn, x_bnc, one.txt_kblc, one.vec_kbp, time_b, rope, one.cond_kbnc, guidance_b
        )
        cache = jax.tree.map(lambda a, new: jax.lax.dynamic_update_index_in_dim(a, new, order_k[j], 0), cache, kept)
        total_bnc = total_bnc + weights_kn[j][None, :, None] * velocity_bnc.astype(jnp.float32)
        return total_bnc, cache, computed + full

    start = jnp.zeros_like(x_bnc), cache, jnp.zeros((), jnp.int32)
    velocity_bnc, cache, computed = jax.lax.fori_loop(0, count, add_branch, start)
    x_bnc, finite = moved(x_bnc, velocity_bnc, level, next_level, where.mesh)
    return x_bnc, finite, cache, computed


def moved(
    x_bnc: jax.Array, velocity_bnc: jax.Array, level: jax.Array, next_level: jax.Array, mesh: Mesh
) -> tuple[jax.Array, jax.Array]:
    """(latents after an Euler step, whether these are finite; if they are not, the latents are those before it)."""
    moved_bnc = x_bnc + (next_level - level) * velocity_bnc
    finite = jnp.isfinite(moved_bnc).all()
    x_bnc = jnp.where(finite, moved_bnc, x_bnc)  # what a diagnosis begins with
    # Laid out as it came in: otherwise the second step would be compiled anew for the layout that the first one chose.
    return jax.lax.with_sharding_constraint(x_bnc, NamedSharding(mesh, SPECS.tokens_bnc)), finite


def joint_attention(sequence: JointSequence, where: Where) -> JointAttention:
    """Attention over the whole joint sequence, to be called on a device's part of it, inside `shard_map`."""
    return functools.partial(ulysses_attention, sequence=sequence, attend=where.attend, axis=SPECS.seq_axis)


everywhere = functools.partial(jax.lax.psum, axis_name=(SPECS.data_axis, SPECS.seq_axis))  # summed over all devices


def _sharded_forward(
    sequence: JointSequence, where: Where, cond: bool, guidance: bool, cached: bool
) -> Callable[..., tuple[jax.Array, Kept | None, jax.Array]]:
    """The model inside one `shard_map`: every operation is local to a device's tokens except the attention.

    (velocity, what is kept, whether all blocks were computed); if not cached nothing is kept, and all always are.
    """
    attention = joint_attention(sequence, where)

    def forward(model, kept, limit, valid_bn, x_bnc, txt_blc, vec_bp, time_b, rope, cond_bnc, guidance_b):
        if not cached:
            given = x_bnc, txt_blc, vec_bp, time_b, rope, attention, cond_bnc, guidance_b
            velocity_bnc = model(*given, operations=where.operations)
            return velocity_bnc, None, jnp.ones((), bool)
        embedded = model.embed(x_bnc, txt_blc, vec_bp, time_b, cond_bnc, guidance_b)
        return cached_forward(model, kept, limit, valid_bn, everywhere, embedded, rope, attention, where.operations)

    tokens = SPECS.tokens_bnc
    kept = None if not cached else Kept(tokens, tokens, SPECS.everywhere)
    limit, valid = (SPECS.everywhere, SPECS.tokens_bn) if cached else (None, None)
    specs = (
        SPECS.everywhere,
        kept,
        limit,
        valid,
        tokens,
        tokens,
        SPECS.rows_bc,
        SPECS.rows_b,
        SPECS.rope_1nd,
    )
    optional = (tokens if cond else None, SPECS.rows_b if guidance else None)
    out = (tokens, kept, SPECS.everywhere)
    return jax.shard_map(forward, mesh=where.mesh, in_specs=(*specs, *optional), out_specs=out, check_vma=False)
