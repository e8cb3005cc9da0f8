"""The loss of the autoencoder, and the scale of its latents.

B clips, T/H/W frames/rows/columns, C colours, t/h/w latent frames/rows/columns, c latent channels.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from osjax.models.hunyuan_vae import HunyuanVAE
from osjax.models.resnet_vae import posterior, sample_posterior
from osjax.training.options import VAEOptions

PEAK = 2.0  # of pixels in [-1, 1]


def vae_loss(
    vae: HunyuanVAE, video_bthwc: jax.Array, key: jax.Array, options: VAEOptions
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(loss [], {psnr, kl}) of videos in [-1, 1]: error of the reconstruction, and KL to a standard normal per element
    (Kingma & Welling 2014, appendix B).

    In `given_share` of the clips the first latent frame, and in as many the last, is that of the frame encoded by
    itself: the sampler puts references into its latents like that, so the decoder has to know them. The last latent
    stands for several frames, of which only the very last is then seen; the others follow from those around them.
    """
    x_bthwc = video_bthwc.astype(vae.encoder.conv_in.kernel.dtype)
    noise_key, head_key, tail_key = jax.random.split(key, 3)
    moments_bthwc = vae.encoder(x_bthwc).astype(jnp.float32)
    if x_bthwc.shape[1] > 1 and options.given_share:
        ends = (vae.encoder(x_bthwc[:, at]).astype(jnp.float32) for at in (slice(None, 1), slice(-1, None)))
        for at, alone_b1hwc, one in zip((slice(None, 1), slice(-1, None)), ends, (head_key, tail_key), strict=True):
            given_b = jax.random.bernoulli(one, options.given_share, x_bthwc.shape[:1])[:, None, None, None, None]
            joined = jnp.where(given_b, alone_b1hwc, moments_bthwc[:, at])
            moments_bthwc = moments_bthwc.at[:, at].set(joined)
    mean_bthwc, logvar_bthwc = posterior(moments_bthwc)
    z_bthwc = sample_posterior(mean_bthwc, logvar_bthwc, noise_key)
    error_bthwc = vae.decoder(z_bthwc.astype(x_bthwc.dtype)).astype(jnp.float32) - video_bthwc
    squared = jnp.square(error_bthwc).mean()
    kl = 0.5 * (jnp.square(mean_bthwc) + jnp.exp(logvar_bthwc) - 1.0 - logvar_bthwc).mean()
    loss = options.l1_weight * jnp.abs(error_bthwc).mean() + options.l2_weight * squared + options.kl_weight * kl
    return loss, {"psnr": psnr(squared), "kl": kl}


def psnr(squared_error: jax.Array) -> jax.Array:
    """Peak signal-to-noise ratio in dB of a mean squared error of pixels in [-1, 1]."""
    return 20 * jnp.log10(PEAK) - 10 * jnp.log10(squared_error)


def latent_scale(z_bthwc: jax.Array, scale_factor: float, shift_factor: float) -> dict[str, float]:
    """The scale_factor and shift_factor for which the clips of these latents would have mean 0 and deviation 1.

    z [B, t, h, w, c]: as `encode` returned them; scale_factor, shift_factor: those that it used.
    """
    raw_bthwc = z_bthwc.astype(jnp.float32) / scale_factor + shift_factor
    return {"scale_factor": float(1 / raw_bthwc.std()), "shift_factor": float(raw_bthwc.mean())}
