"""References to latents, and latents to frames: what an autoencoder does before and after sampling.

T/H/W frames/height/width in pixels, t/h/w in latents, B videos.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

from osjax.diagnose import first_bad_layer, not_finite
from osjax.media import to_uint8
from osjax.residency import Residency

BROKEN = "convert the bundle again"  # what to do where no layer is to blame for what is not finite


def encode(residency: Residency, vae_name: str, clips: Sequence[np.ndarray], key: jax.Array | None) -> list[jax.Array]:
    """Clips THWC in [-1, 1] → latents thwc float32, each encoded by itself: the posterior's mode, or a sample by a key.

    Raises OsjaxError if they are not finite.
    """
    if not clips:
        return []
    dtype = residency.dtype
    with residency.on_device(vae_name) as vae:
        latents = [vae.encode(jnp.asarray(clip[None], dtype), key)[0].astype(jnp.float32) for clip in clips]
        for clip, z_thwc in zip(clips, latents, strict=True):
            if not all_finite(z_thwc):
                layer = first_bad_layer(vae, lambda vae, clip=clip: vae.encode(jnp.asarray(clip[None], dtype)))
                raise not_finite("the latents of a reference are", layer, dtype, BROKEN)
        return latents


def decode(residency: Residency, vae_name: str, z_bthwc: jax.Array, *, progress: bool) -> np.ndarray:
    """Latents → uint8 frames [B, T, H, W, 3], one video at a time; progress: with a bar of its tiles.

    Raises OsjaxError if they are not finite.
    """
    videos = []
    with residency.on_device(vae_name) as vae:
        for z_thwc in z_bthwc:
            with tqdm(desc="decode", unit="tile", disable=not progress) as bar:
                x_thwc = vae.decode(z_thwc[None], lambda done, total, bar=bar: _advance(bar, done, total))[0]
            finite, frames = _frames(x_thwc)
            if not finite:
                layer = first_bad_layer(vae, lambda vae, z_thwc=z_thwc: vae.decode(z_thwc[None]))
                raise not_finite("the decoded frames are", layer, residency.dtype, BROKEN)
            videos.append(np.asarray(frames))
    return np.stack(videos)


def all_finite(arrays: Any) -> bool:
    """Whether every array of a pytree is."""
    return all(bool(jnp.isfinite(array).all()) for array in jax.tree.leaves(arrays))


@jax.jit
def _frames(x_thwc: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(whether all is finite, uint8 frames), in one pass: a video in float32 is too large to make just for this."""
    return jnp.isfinite(x_thwc).all(), to_uint8(x_thwc)


def _advance(bar: tqdm, done: int, total: int) -> None:
    bar.total = total
    bar.update(done - bar.n)
