"""The denoising loop: Euler steps of the rectified flow, guided by a weighted sum over the branches that matter.

B batch, N image tokens, L text tokens, C channels of a token, P pooled-text width, K guidance branches, S steps,
t latent frames.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from osjax.diagnose import first_bad_layer, not_finite
from osjax.models.mmdit import MMDiT
from osjax.models.rope import Rope
from osjax.models.streamed import StreamedMMDiT
from osjax.parallel.specs import SPECS
from osjax.parallel.ulysses import JointSequence
from osjax.sampling.caching import Kept, Reuse, nothing_kept
from osjax.sampling.guidance import GuidedStep
from osjax.sampling.step import Branches, Where, euler_step
from osjax.sampling.streaming import streamed_step


def denoise(
    model: MMDiT | StreamedMMDiT,
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
    says when passes are cut short, which is approximate; None for never. A model whose blocks wait in host memory is
    taken through block by block, all branches of a step together.
    Returns x, and how many forward passes were computed in full for each sample.
    Equal on every mesh up to the order of float sums.
    Raises OsjaxError naming the step, and the first layer, if the latents stop being finite.
    """
    take_step, outer = (streamed_step, model.rest) if isinstance(model, StreamedMMDiT) else (euler_step, model)
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
        cache = _empty_cache(outer, x.shape, len(branches.txt_kblc), where.mesh)
        valid = put(pad(np.ones((batch, tokens), np.float32), "bn"), SPECS.tokens_bn)
    passes = 0
    for index, step in enumerate(plan):
        order = np.zeros(len(branches.txt_kblc), np.int32)
        weights = np.zeros((len(order), tokens), np.float32)
        used, frames = step.weights_kt.shape
        order[:used], weights[:used] = step.branches, np.repeat(step.weights_kt, tokens // frames, axis=1)
        level, next_level = np.asarray(levels_s[index : index + 2], np.float32)
        advance = functools.partial(
            take_step,
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
                outer.img_in.kernel.dtype,
                "try a lower guidance",
            )
        on_step(index + 1, x[:batch, :tokens])
    return x[:batch, :tokens], passes


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
