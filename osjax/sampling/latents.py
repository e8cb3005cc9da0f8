"""From noise, text and references to latents that are ready to decode: the sampler as one pure function.

B batch, t/h/w latent frames/rows/columns, C latent channels, L text tokens, P pooled-text width.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from osjax.models.mmdit import MMDiT
from osjax.models.rope import rope_table
from osjax.sampling import guidance, schedule
from osjax.sampling.caching import SPEEDS
from osjax.sampling.condition import ConditionKind, condition, replace_references
from osjax.sampling.denoise import denoise
from osjax.sampling.geometry import LatentGrid, image_ids, pack, unpack
from osjax.sampling.step import Branches, Where


class Text(NamedTuple):
    """Encoded prompts: T5 states [B, L, width] and pooled CLIP vectors [B, P]."""

    states_blc: jax.Array
    pooled_bp: jax.Array


@dataclasses.dataclass(frozen=True)
class SamplingOptions:
    """Steps, guidance, the schedule's shift (see `osjax.sampling.schedule.timesteps`), and whether forward passes may
    be cut short (`osjax.sampling.caching.SPEEDS`).

    A model with `guidance_embed`, such as FLUX.1-dev, is told the text's scale and takes one pass a step.
    """

    steps: int = 50
    guidance: guidance.Guidance = guidance.Guidance()
    shift: bool = True
    flow_shift: float | None = None
    speed: str = "exact"

    def branch_scales(self, told: bool) -> guidance.Guidance:
        """How branches are weighted, for a model that is told its guidance or one that is not."""
        return guidance.Guidance(text=1.0, image=1.0) if told else self.guidance


def sample_latents(
    model: MMDiT,
    noise_bthwc: jax.Array,
    text: Text,
    negative: Text,
    references: Sequence[Sequence[jax.Array]],
    kind: ConditionKind,
    options: SamplingOptions,
    where: Where,
    on_step: Callable[[int, jax.Array], None] = lambda done, x_bnc: None,
    *,
    causal: bool = True,
) -> tuple[jax.Array, int]:
    """(latents bthwc float32, forward passes that each sample took in full).

    noise [B, t, h, w, C] standard normal; `text` and `negative` of B prompts each; `references` one list a sample
    of its encoded references, head before tail, each [t', h, w, C]; `on_step` as in `denoise`; `causal` says of the
    autoencoder whether its first frame has a latent of its own.
    Raises OsjaxError if a reference is too short, or the latents stop being finite.
    """
    _, t, h, w, _ = noise_bthwc.shape
    grid = LatentGrid(t, h, w, model.config.patch_size)
    mask_bthw1, given_bthwc = condition(noise_bthwc.shape, references, kind, causal)
    cond_bnc = pack(jnp.concatenate([mask_bthw1, given_bthwc], axis=-1), grid.patch)
    told = model.config.guidance_embed
    told_b = jnp.full(noise_bthwc.shape[:1], options.guidance.text, jnp.float32) if told else None
    # In the order of guidance's branches: prompt, negative prompt, negative prompt without the condition.
    branches = Branches(
        jnp.stack([text.states_blc, negative.states_blc, negative.states_blc]),
        jnp.stack([text.pooled_bp, negative.pooled_bp, negative.pooled_bp]),
        jnp.stack([cond_bnc, cond_bnc, jnp.zeros_like(cond_bnc)]) if model.config.cond_embed else None,
    )
    plan = guidance.plan(
        options.branch_scales(told),
        options.steps,
        t,
        image_condition=kind.is_image,
        same_text=all(bool(jnp.array_equal(a, b)) for a, b in zip(text, negative, strict=True)),
        same_condition=not bool(cond_bnc.any()),
    )
    levels = schedule.timesteps(
        options.steps, grid.tokens_per_frame, t, shift=options.shift, flow_shift=options.flow_shift
    )
    rope = rope_table(image_ids(grid)[None], model.config.axes_dim, model.config.theta)
    x_bnc, passes = denoise(
        model,
        pack(noise_bthwc, grid.patch),
        branches,
        rope,
        plan,
        levels,
        where,
        told_b,
        on_step=on_step,
        reuse=SPEEDS[options.speed],
    )
    z_bthwc = replace_references(unpack(x_bnc, grid), mask_bthw1, given_bthwc, kind)
    return z_bthwc, passes
