"""The denoising loop: Euler steps of the rectified flow, guided by a weighted sum over the branches that matter.

B batch, N image tokens, L text tokens, C channels of a token, P pooled-text width, K guidance branches, S steps,
t latent frames.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from osjax.diagnose import first_bad_layer, not_finite
from osjax.kernels.attention import Attention
from osjax.models.mmdit import MMDiT
from osjax.models.operations import BY_XLA, Operations
from osjax.models.rope import Rope
from osjax.parallel.specs import SPECS
from osjax.parallel.ulysses import JointSequence, ulysses_attention
from osjax.sampling.caching import Kept, Reuse, cached_forward, nothing_kept
from osjax.sampling.guidance import GuidedStep


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


def denoise(
    model: MMDiT,
    x_bnc: jax.Array,
    branches: Branches,
    rope: Rope,
    plan: Sequence[GuidedStep],
    levels_s: np.ndarray,
    where: Where,
    guidance_b: jax.Array | None = None,
    on_step: Callable[[int, jax.Array], None] = lambda done, x_bnc: None,
    reuse: Reuse | None = None,
) -> tuple[jax.Array, int]:
    """Integrates x along the noise levels: x ← x + (s_next − s) · Σ_k weight_k · velocity_k.

    x [B, N, C] noise, its tokens ordered frame by frame, kept in float32; `rope` over the N tokens; `plan` says for
    each of S steps which of the K branches are computed and their weight per latent frame; `levels_s` [S + 1] from 1
    to 0; `guidance_b` [B] for guidance-distilled models only; `on_step(steps done, x [B, N, C])` is called after each
    step with latents that live only during the call, because the next step takes over their memory; `reuse`
    says when passes are cut short, which is approximate; None for never.
    Returns x, and how many forward passes were computed in full for each sample.
    Equal on every mesh up to the order of float sums.
    Raises OsjaxError naming the step, and the first layer, if the latents stop being finite.
    """
    batch, tokens = x_bnc.shape[:2]
    sequence = JointSequence(branches.txt_kblc.shape[2], tokens, where.mesh.shape[SPECS.seq_axis])
    rows = -batch % where.mesh.shape[SPECS.data_axis]
    pad = functools.partial(_pad, rows=rows, text=sequence.text_padding, image=sequence.image_padding)
    put = functools.partial(_put, mesh=where.mesh)
    # A copy: the compiled step donates its latents, which must not be the caller's.
    x = put(pad(jnp.array(x_bnc, jnp.float32, copy=True), "bn"), SPECS.tokens_bnc)
    inputs = Branches(
        put(pad(branches.txt_kblc, "kbl"), SPECS.branch_tokens_kbnc),
        put(pad(branches.vec_kbp, "kb"), SPECS.branch_rows_kbc),
        None if branches.cond_kbnc is None else put(pad(branches.cond_kbnc, "kbn"), SPECS.branch_tokens_kbnc),
    )
    tables = Rope(*(put(pad(table, "1n"), SPECS.rope_1nd) for table in rope))
    guidance = None if guidance_b is None else put(pad(guidance_b, "b"), SPECS.rows_b)
    cache = valid = None
    if reuse is not None:
        cache = _empty_cache(model, x.shape, len(branches.txt_kblc), where.mesh)
        valid = put(pad(np.ones((batch, tokens), np.float32), "bn"), SPECS.tokens_bn)
    passes = 0
    for index, step in enumerate(plan):
        order = np.zeros(len(branches.txt_kblc), np.int32)
        weights = np.zeros((len(order), tokens), np.float32)
        used, frames = step.weights_kt.shape
        order[:used], weights[:used] = step.branches, np.repeat(step.weights_kt, tokens // frames, axis=1)
        level, next_level = np.asarray(levels_s[index : index + 2], np.float32)
        advance = functools.partial(
            euler_step,
            branches=inputs,
            rope=tables,
            weights_kn=put(pad(weights, "kn"), SPECS.token_weights_kn),
            order_k=order,
            count=np.int32(used),
            level=level,
            next_level=next_level,
            guidance_b=guidance,
            sequence=sequence,
            where=where,
        )
        limit = None if reuse is None else reuse.limit_at(index, len(plan))
        x, finite, cache, computed = advance(model, x, cache=cache, limit=limit, valid_bn=valid)
        finite, computed = jax.device_get((finite, computed))
        passes += int(computed)
        if not finite:
            layer = first_bad_layer(model, functools.partial(advance, x_bnc=x))
            raise not_finite(
                f"the latents after step {index + 1} of {len(plan)} are",
                layer,
                model.img_in.kernel.dtype,
                "try a lower guidance",
            )
        on_step(index + 1, x[:batch, :tokens])
    return x[:batch, :tokens], passes


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
    moved_bnc = x_bnc + (next_level - level) * velocity_bnc
    finite = jnp.isfinite(moved_bnc).all()
    x_bnc = jnp.where(finite, moved_bnc, x_bnc)  # what a diagnosis begins with
    # Laid out as it came in: otherwise the second step would be compiled anew for the layout that the first one chose.
    x_bnc = jax.lax.with_sharding_constraint(x_bnc, NamedSharding(where.mesh, SPECS.tokens_bnc))
    return x_bnc, finite, cache, computed


def _sharded_forward(
    sequence: JointSequence, where: Where, cond: bool, guidance: bool, cached: bool
) -> Callable[..., tuple[jax.Array, Kept | None, jax.Array]]:
    """The model inside one `shard_map`: every operation is local to a device's tokens except the attention.

    (velocity, what is kept, whether all blocks were computed); if not cached nothing is kept, and all always are.
    """
    attention = functools.partial(ulysses_attention, sequence=sequence, attend=where.attend, axis=SPECS.seq_axis)
    everywhere = functools.partial(jax.lax.psum, axis_name=(SPECS.data_axis, SPECS.seq_axis))

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


def _empty_cache(model: MMDiT, shape: tuple[int, ...], branches: int, mesh: Mesh) -> Kept:
    """Made where it is to lie. shape: of the tokens, B and N first."""
    tokens, everywhere = (NamedSharding(mesh, spec) for spec in (SPECS.branch_tokens_kbnc, SPECS.everywhere))
    make = functools.partial(nothing_kept, branches, *shape[:2], model.config.hidden_size, model.img_in.kernel.dtype)
    return jax.jit(make, out_shardings=Kept(tokens, tokens, everywhere))()


def _pad(array: jax.Array, dims: str, *, rows: int, text: int, image: int) -> jax.Array:
    """Zeros behind the batch (b), text (l) and image (n) dims so that each divides over its mesh axis."""
    behind = {"b": rows, "l": text, "n": image}
    widths = [(0, behind.get(dim, 0)) for dim in dims] + [(0, 0)] * (array.ndim - len(dims))
    if not any(after for _, after in widths):
        return array
    return (np if isinstance(array, np.ndarray) else jnp).pad(array, widths)


def _put(array: jax.Array, spec: PartitionSpec, *, mesh: Mesh) -> jax.Array:
    return jax.device_put(array, NamedSharding(mesh, spec))
