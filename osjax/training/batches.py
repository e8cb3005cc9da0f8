"""What streams give to a stage, and how it comes onto the mesh.

B clips, T/H/W frames/rows/columns in pixels, t/h/w in latents, c latent channels, L tokens.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from osjax.errors import OsjaxError
from osjax.media import to_model
from osjax.models.hunyuan_vae import HunyuanVAE
from osjax.parallel.specs import TRAINING_ROWS
from osjax.training.drawing import Tracks, draw
from osjax.training.text import TokenIds

STORED = np.float16  # of what frozen encoders make: latents have deviation 1, embeddings are normalised
# Which end of the clip, and how many frames from there, are encoded by themselves: ("head", 1) is the first frame.
End = tuple[str, int]


@dataclasses.dataclass(frozen=True)
class Drawn:
    """Shapes clips that are yet to be drawn on the device. write: gives their captions, which not every stage reads."""

    tracks: Tracks
    height: int
    width: int
    write: Callable[[], Sequence[str]]

    @property
    def captions(self) -> Sequence[str]:
        return self.write()


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Clips that are latents already: z bthwc; ends: the latents of references, each bthwc; prompts: captions,
    int32 [B, L] for each text encoder."""

    z_bthwc: np.ndarray
    ends: Mapping[End, np.ndarray]
    prompts: TokenIds


class Latents(NamedTuple):
    """Clips on the device: clean latents bthwc and those of every end that may be given."""

    z_bthwc: jax.Array
    ends: dict[End, jax.Array]


def encode(vae: HunyuanVAE, video_bthwc: jax.Array, ends: frozenset[End]) -> Latents:
    """Latents of videos in [-1, 1], and of their ends encoded by themselves; the posterior's mode, float32."""
    x_bthwc = video_bthwc.astype(vae.encoder.conv_in.kernel.dtype)
    cut = {(side, count): x_bthwc[:, :count] if side == "head" else x_bthwc[:, -count:] for side, count in ends}
    encoded = {end: vae.encode(clip_bthwc).astype(jnp.float32) for end, clip_bthwc in cut.items()}
    return Latents(vae.encode(x_bthwc).astype(jnp.float32), encoded)


def video_of(batch: Any, mesh: Mesh) -> jax.Array:
    """A batch's videos on the mesh, float32 [B, T, H, W, 3] in [-1, 1], whether drawn or read from files."""
    if isinstance(batch, Drawn):
        return draw(put(batch.tracks, mesh), batch.height, batch.width)
    video_bthwc, bucket = batch.video_bthwc, batch.bucket
    if video_bthwc is None:  # this host's latents are cached, but another host needs its own, and all encode together
        video_bthwc = np.zeros((len(batch.indices), bucket.num_frames, bucket.height, bucket.width, 3), np.uint8)
    return to_model(put(video_bthwc, mesh))


def put(tree: Any, mesh: Mesh) -> Any:
    """Host arrays whose first axis is this host's part of the batch → arrays over the mesh."""
    sharding = NamedSharding(mesh, TRAINING_ROWS)
    return jax.tree.map(lambda array: jax.make_array_from_process_local_data(sharding, np.asarray(array)), tree)


def local_rows(tree: Any, mesh: Mesh) -> Any:
    """The inverse of `put`: this host's rows of arrays over the mesh, however they lie there, as they are stored."""
    by_rows = jax.device_put(tree, NamedSharding(mesh, TRAINING_ROWS))
    return jax.tree.map(_rows_here, by_rows)


def local_batch(batch_size: int, mesh: Mesh) -> int:
    """Clips of a batch that this host brings. Raises OsjaxError for a batch that does not divide over the mesh."""
    devices = math.prod(mesh.shape[axis] for axis in TRAINING_ROWS[0])
    if batch_size % devices:
        raise OsjaxError(
            f"run.batch_size {batch_size} does not divide over data x fsdp = {devices} devices: "
            f"use a multiple, such as {-(-batch_size // devices) * devices}"
        )
    return batch_size // jax.process_count()


def _rows_here(array: jax.Array) -> np.ndarray:
    """Each row once, though several devices may hold it."""
    shards = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(shards[start], STORED) for start in sorted(shards)])
