"""The causal 3D VAE of HunyuanVideo, as Open-Sora 2.0 uses it.

B batch, T/H/W frames/height/width (pixels outside, latents inside), C channels.
Convolutions and attention see no later frame; group norms average over all frames of a tile, as the reference's do.
Videos are in [-1, 1]; latents leave `encode` scaled, and enter `decode` so.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from osjax.errors import OsjaxError
from osjax.models.conv3d import CausalConv3D, Factors
from osjax.models.resnet_vae import Arrangement, Decoder, Encoder, posterior_latents, run_network
from osjax.models.tiling import AxisTiles, Order, Progress, TiledConfig, TiledModel, Tiling, apply_tiled, check_video

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "mish": jax.nn.mish,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
}


@dataclasses.dataclass(frozen=True)
class HunyuanVAEConfig(TiledConfig):
    """Options of the published model.

    block_out_channels: width of each level, from the pixels' to the latents'; layers_per_block: residual blocks of a
        level of the encoder (the decoder has one more).
    sample_size, sample_tsize: side and frames of a tile, in pixels; tile_overlap_factor: share of it that overlaps.
    use_slicing: one video of the batch at a time, to save memory; the result is the same.
    """

    in_channels: int = 3
    out_channels: int = 3
    latent_channels: int = 16
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    norm_num_groups: int = 32
    act_fn: str = "silu"
    mid_block_add_attention: bool = True
    time_compression_ratio: int = 4
    spatial_compression_ratio: int = 8
    scale_factor: float = 0.476986
    shift_factor: float = 0.0
    sample_size: int = 256
    sample_tsize: int = 64
    tile_overlap_factor: float = 0.25
    use_slicing: bool = False
    use_spatial_tiling: bool = True
    use_temporal_tiling: bool = False

    def __post_init__(self) -> None:
        if self.time_compression_ratio not in (4, 8):
            raise OsjaxError(f"time_compression_ratio is {self.time_compression_ratio}: use 4 or 8")
        if self.spatial_compression_ratio < 1 or self.spatial_compression_ratio.bit_count() != 1:
            raise OsjaxError(f"spatial_compression_ratio is {self.spatial_compression_ratio}: use a power of two")
        if not self.block_out_channels or any(c < 1 or c % self.norm_num_groups for c in self.block_out_channels):
            raise OsjaxError(
                f"block_out_channels {self.block_out_channels} do not split into {self.norm_num_groups} groups: "
                "use multiples of norm_num_groups"
            )
        if self.act_fn not in ACTIVATIONS:
            raise OsjaxError(f"act_fn is {self.act_fn!r}: use one of {', '.join(ACTIVATIONS)}")
        if self.scale_factor == 0:
            raise OsjaxError("scale_factor is 0, so latents hold nothing: use another value")
        _ = self.encode_tiling, self.decode_tiling  # tiles that cannot advance are an error here, not in mid-video

    @property
    def causal(self) -> bool:
        """The first frame has a latent of its own: 1 + ratio · n frames are 1 + n latents."""
        return True

    @property
    def level_factors(self) -> tuple[Factors, ...]:
        """(time, height, width) resampling after each level, the same for encoder and decoder, each from its own input.

        Space is resampled in the first levels. Time, for a ratio of 4, in the last levels before the final one; for a
        ratio of 8, wherever space is.
        """
        levels = len(self.block_out_channels)
        in_space = [i < math.log2(self.spatial_compression_ratio) for i in range(levels)]
        late = [levels - 3 <= i < levels - 1 for i in range(levels)]
        in_time = in_space if self.time_compression_ratio == 8 else late
        return tuple((1 + time, 1 + space, 1 + space) for time, space in zip(in_time, in_space, strict=True))

    @property
    def arrangement(self) -> Arrangement:
        """What encoder and decoder are made of."""
        return Arrangement(
            conv=CausalConv3D,
            act=ACTIVATIONS[self.act_fn],
            groups=self.norm_num_groups,
            attention=self.mid_block_add_attention,
            widths=self.block_out_channels,
            depth=self.layers_per_block,
            factors=self.level_factors,
            quant_conv=True,
            in_channels=self.in_channels,
            out_channels=self.out_channels,
            latent_channels=self.latent_channels,
        )

    def _tiling(self, order: Order) -> Tiling:
        # The reference takes the latent side of a tile from the number of levels, its latent frames from the ratio.
        side = order(self.sample_size, self.sample_size // 2 ** (len(self.block_out_channels) - 1))
        frames = order(self.sample_tsize, self.sample_tsize // self.time_compression_ratio)
        return Tiling(
            time=AxisTiles(*frames, self.tile_overlap_factor, causal=True) if self.use_temporal_tiling else None,
            space=AxisTiles(*side, self.tile_overlap_factor) if self.use_spatial_tiling else None,
        )


class HunyuanVAE(TiledModel):
    """The autoencoder. Its methods run tile by tile, each tile in one jitted call per tile shape."""

    def __init__(self, config: HunyuanVAEConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype = jnp.float32):
        self.config = config
        self.encoder = Encoder(config.arrangement, rngs=rngs, dtype=dtype)
        self.decoder = Decoder(config.arrangement, rngs=rngs, dtype=dtype)

    def moments(self, x_bthwc: jax.Array, progress: Progress | None = None) -> jax.Array:
        """Posterior of a video in [-1, 1]: mean | log-variance (not clamped) on the last axis, [B, t, h, w, 2·C].

        progress: called with (tiles done, tiles in all); for use outside jit.
        Raises OsjaxError for an array that is no video of `in_channels` channels.
        """
        check_video(x_bthwc, self.config.in_channels, "video to encode")
        run = functools.partial(run_network, self.encoder, one_by_one=self.config.use_slicing)
        return apply_tiled(run, x_bthwc, self.config.encode_tiling, progress)

    def encode(self, x_bthwc: jax.Array, key: jax.Array | None = None, progress: Progress | None = None) -> jax.Array:
        """Scaled latents [B, t, h, w, C] of a video: the posterior's mode, or a sample of it when a key is given.

        t, h and w are T, H and W over the compression ratios, rounded up. Errors and progress as in `moments`.
        """
        moments_bthwc = self.moments(x_bthwc, progress)
        scale, shift = self.config.scale_factor, self.config.shift_factor
        return posterior_latents(moments_bthwc, key, scale_factor=scale, shift_factor=shift)

    def decode(self, z_bthwc: jax.Array, progress: Progress | None = None) -> jax.Array:
        """Video [B, T, H, W, out_channels], about [-1, 1] (not clamped), of scaled latents as `encode` returns them.

        T is 1 + (t - 1) · ratio. Raises OsjaxError for an array that is no latent; progress as in `moments`.
        """
        check_video(z_bthwc, self.config.latent_channels, "latent to decode")
        z_bthwc = z_bthwc.astype(jnp.float32) / self.config.scale_factor + self.config.shift_factor
        run = functools.partial(run_network, self.decoder, one_by_one=self.config.use_slicing)
        return apply_tiled(run, z_bthwc, self.config.decode_tiling, progress)
