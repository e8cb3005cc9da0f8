"""The rectified-flow loss (specification, section 8): how far the predicted velocity is from the true one.

B batch, N image tokens, L text tokens, C channels of a token, P pooled-text width, t/h/w latent frames/rows/columns,
c latent channels.

A straight path runs from the data x₀ to noise, x_s = (1 − s)·x₀ + (σ + (1 − σ)·s)·ε with σ = 1e-5, whose velocity is
(1 − σ)·ε − x₀ (Liu et al. 2022, "Flow Straight and Fast"; the levels s are drawn as in Esser et al. 2024, section 3.1:
the sigmoid of a normal variable, shifted by the size of the video).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from osjax.models.mmdit import JointAttention, MMDiT
from osjax.models.rope import rope_table
from osjax.sampling.geometry import LatentGrid, image_ids, pack
from osjax.sampling.latents import Text
from osjax.sampling.schedule import shift_alpha, time_shift

SIGMA_MIN = 1e-5


class Clean(NamedTuple):
    """Clean latents bthwc, and what conditions them: mask bthw1 and the references' latents under it, bthwc."""

    z_bthwc: jax.Array
    mask_bthw1: jax.Array
    given_bthwc: jax.Array


class Draw(NamedTuple):
    """The random part of one loss: standard normal numbers behind the noise levels [B], and the noise [B, N, C]."""

    normal_b: jax.Array
    noise_bnc: jax.Array


def draw(key: jax.Array, grid: LatentGrid, latent_channels: int, batch: int) -> Draw:
    """Draws for a batch of that grid, float32."""
    levels, noise = jax.random.split(key)
    channels = latent_channels * grid.patch**2
    return Draw(jax.random.normal(levels, (batch,)), jax.random.normal(noise, (batch, grid.tokens, channels)))


def grid_of(z_bthwc: jax.Array, patch: int) -> LatentGrid:
    """The grid that latents lie on."""
    return LatentGrid(*z_bthwc.shape[1:4], patch)


def noisy(x_bnc: jax.Array, drawn: Draw, alpha: float) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(level s [B], tokens at that level, their velocity), float32; `alpha` shifts the levels as in sampling."""
    s_b = time_shift(alpha, jax.nn.sigmoid(drawn.normal_b))
    s_b11 = s_b[:, None, None]
    x_s_bnc = (1 - s_b11) * x_bnc + (SIGMA_MIN + (1 - SIGMA_MIN) * s_b11) * drawn.noise_bnc
    return s_b, x_s_bnc, (1 - SIGMA_MIN) * drawn.noise_bnc - x_bnc


def flow_loss(
    model: MMDiT,
    clean: Clean,
    text: Text,
    drawn: Draw,
    attention: JointAttention,
    *,
    remat: bool = False,
    loss_on_given: bool = True,
    flow_shift: float | None = None,
    guidance_b: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """(loss [], prediction [B, N, C] float32): mean squared error of the velocity over all tokens, in float32.

    remat: recompute each block in the backward pass; loss_on_given: if not, tokens of latent frames that a reference
    gives do not count; flow_shift: α of the noise levels, if not that of the video's size. The condition is read if the
    model embeds one.
    """
    patch = model.config.patch_size
    grid = grid_of(clean.z_bthwc, patch)
    alpha = shift_alpha(grid.tokens_per_frame, grid.t) if flow_shift is None else flow_shift
    s_b, x_bnc, velocity_bnc = noisy(pack(clean.z_bthwc, patch).astype(jnp.float32), drawn, alpha)
    cond_bnc = None
    if model.config.cond_embed:
        cond_bnc = pack(jnp.concatenate([clean.mask_bthw1, clean.given_bthwc], axis=-1), patch)
    rope = rope_table(image_ids(grid)[None], model.config.axes_dim, model.config.theta)
    predicted_bnc = model(
        x_bnc, text.states_blc, text.pooled_bp, s_b, rope, attention, cond_bnc, guidance_b, remat=remat
    ).astype(jnp.float32)
    error_bn = jnp.square(predicted_bnc - velocity_bnc).mean(axis=-1)
    if loss_on_given:
        return error_bn.mean(), predicted_bnc
    free_bn = 1.0 - pack(clean.mask_bthw1, patch)[..., 0].astype(jnp.float32)
    return (error_bn * free_bn).sum() / jnp.maximum(free_bn.sum(), 1.0), predicted_bnc
