"""Training the autoencoder on clips."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from osjax.media import to_uint8
from osjax.models.hunyuan_vae import HunyuanVAE
from osjax.training.autoencode import latent_scale, vae_loss
from osjax.training.batches import video_of
from osjax.training.options import TrainConfig
from osjax.training.parts import Parts, export
from osjax.training.state import Weights
from osjax.training.streams import Stream


@dataclasses.dataclass(frozen=True)
class VAEStage:
    """See `osjax.training.stages.Stage`."""

    config: TrainConfig
    parts: Parts
    mesh: Mesh
    stream: Stream

    def loss(
        self, trained: Weights, frozen: Weights, video_bthwc: jax.Array, key: jax.Array
    ) -> tuple[jax.Array, dict[str, jax.Array]]:
        vae = self.parts.build(trained)["vae"]
        return vae_loss(vae, video_bthwc, key, self.config.vae)

    def prepare(self, frozen: Weights, batch: Any) -> jax.Array:
        return video_of(batch, self.mesh)

    def samples(self, trained: Weights, frozen: Weights, video_bthwc: jax.Array) -> Iterator[tuple[str, np.ndarray]]:
        """A clip beside what is left of it after encoding and decoding."""
        again_bthwc = _reconstruct(self.parts.build(trained)["vae"], video_bthwc[:1])
        pair_bthwc = jnp.concatenate([video_bthwc[:1], again_bthwc], axis=3)
        yield "reconstruction", np.asarray(to_uint8(pair_bthwc[0]))

    def export(self, folder: Path, trained: Weights, frozen: Weights, video_bthwc: jax.Array) -> Path:
        """`bundle`, its autoencoder scaled so that latents of these clips have mean 0 and deviation 1."""
        vae = self.parts.build(trained)["vae"]
        scale = latent_scale(_encode(vae, video_bthwc), vae.config.scale_factor, vae.config.shift_factor)
        return export(self.parts, frozen | trained, folder / "bundle", {"vae": scale})


@jax.jit
def _encode(vae: HunyuanVAE, video_bthwc: jax.Array) -> jax.Array:
    return vae.encode(video_bthwc.astype(vae.encoder.conv_in.kernel.dtype))


@jax.jit
def _reconstruct(vae: HunyuanVAE, video_bthwc: jax.Array) -> jax.Array:
    return vae.decode(_encode(vae, video_bthwc)).astype(jnp.float32)
