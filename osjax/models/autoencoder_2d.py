"""The image autoencoder of FLUX.1: a video is to it a row of pictures that know nothing of each other.

B batch, T frames, H/W height/width (pixels outside, latents inside), C channels.
Pictures are in [-1, 1]; latents leave `encode` shifted and scaled, and enter `decode` so.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import nnx

from osjax.errors import OsjaxError
from osjax.kernels.convolution import xla_convolution
from osjax.models.conv3d import Factors, VideoConv
from osjax.models.resnet_vae import Arrangement, Decoder, Encoder, posterior_latents, run_network
from osjax.models.tiling import Progress, check_video

GROUPS = 32  # of every norm, whatever the width


@dataclasses.dataclass(frozen=True)
class Autoencoder2DConfig:
    """Options of the published model, by their published names.

    ch, ch_mult: width of the first level, and of each level as multiples of it, from the pixels' to the latents'.
    num_res_blocks: residual blocks of a level of the encoder (the decoder has one more).
    """

    in_channels: int = 3
    out_ch: int = 3
    z_channels: int = 16
    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    scale_factor: float = 0.3611
    shift_factor: float = 0.1159

    def __post_init__(self) -> None:
        if not self.ch_mult or any(width < 1 or width % GROUPS for width in self.widths):
            raise OsjaxError(
                f"ch {self.ch} times ch_mult {self.ch_mult} does not split into {GROUPS} groups: use multiples of them"
            )
        if self.num_res_blocks < 1:
            raise OsjaxError(f"num_res_blocks is {self.num_res_blocks}: use 1 or more")
        if self.scale_factor == 0:
            raise OsjaxError("scale_factor is 0, so latents hold nothing: use another value")

    @property
    def widths(self) -> tuple[int, ...]:
        """Width of each level, from the pixels' to the latents'."""
        return tuple(self.ch * multiple for multiple in self.ch_mult)

    @property
    def latent_channels(self) -> int:
        return self.z_channels

    @property
    def spatial_compression_ratio(self) -> int:
        """Pixels per latent along height and along width: every level but the last halves both."""
        return 2 ** (len(self.ch_mult) - 1)

    @property
    def time_compression_ratio(self) -> int:
        return 1

    @property
    def causal(self) -> bool:
        """Whether the first frame has a latent of its own, as every frame has."""
        return True

    @property
    def arrangement(self) -> Arrangement:
        """What encoder and decoder are made of."""
        return Arrangement(
            conv=FrameConv,
            act=jax.nn.silu,
            groups=GROUPS,
            attention=True,
            widths=self.widths,
            depth=self.num_res_blocks,
            factors=((1, 2, 2),) * (len(self.ch_mult) - 1) + ((1, 1, 1),),
            quant_conv=False,
            in_channels=self.in_channels,
            out_channels=self.out_ch,
            latent_channels=self.z_channels,
        )


class FrameConv(VideoConv):
    """A 3 x 3 convolution of each frame, with a border of zeros; strided, only behind the last row and column.

    A length n becomes n // 2 for a stride of 2.
    """

    def __init__(
        self, c_in: int, c_out: int, *, stride: Factors = (1, 1, 1), rngs: nnx.Rngs, dtype: jnp.dtype = jnp.float32
    ):
        super().__init__(
            c_in, c_out, (3, 3), strides=stride[1:], padding="VALID", dtype=dtype, param_dtype=dtype, rngs=rngs
        )
        self.border_mode, self.stride, self.convolve = "constant", stride, xla_convolution

    def _kernel(self, frames: int) -> jax.Array:
        return self.kernel[...][None]

    def _borders(self) -> tuple[tuple[int, int], tuple[int, int]]:
        border = (0, 1) if max(self.stride) > 1 else (1, 1)
        return border, border


class Autoencoder2D(nnx.Module):
    """The autoencoder. Each of its methods is one jitted call per shape."""

    def __init__(self, config: Autoencoder2DConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype = jnp.float32):
        self.config = config
        self.encoder = Encoder(config.arrangement, rngs=rngs, dtype=dtype)
        self.decoder = Decoder(config.arrangement, rngs=rngs, dtype=dtype)

    def moments(self, x_bthwc: jax.Array, progress: Progress | None = None) -> jax.Array:
        """Posterior of frames in [-1, 1]: mean | log-variance (not clamped) on the last axis, [B, T, h, w, 2·C].

        progress: called with (frames done, frames in all), when all are; for use outside jit.
        Raises OsjaxError for an array that is no video of `in_channels` channels, or one too small for a latent.
        """
        check_video(x_bthwc, self.config.in_channels, "video to encode")
        ratio = self.config.spatial_compression_ratio
        if min(x_bthwc.shape[2:4]) < ratio:
            raise OsjaxError(f"a picture of {x_bthwc.shape[2:4]} is too small: give at least {ratio} rows and columns")
        return _frame_by_frame(self.encoder, x_bthwc, progress)

    def encode(self, x_bthwc: jax.Array, key: jax.Array | None = None, progress: Progress | None = None) -> jax.Array:
        """Shifted and scaled latents [B, T, h, w, C] of frames: the posterior's mode, or a sample when a key is given.

        h and w are H and W over the compression ratio, rounded down. Errors and progress as in `moments`.
        """
        scale, shift = self.config.scale_factor, self.config.shift_factor
        return posterior_latents(self.moments(x_bthwc, progress), key, scale_factor=scale, shift_factor=shift)

    def decode(self, z_bthwc: jax.Array, progress: Progress | None = None) -> jax.Array:
        """Frames [B, T, H, W, out_ch], about [-1, 1] (not clamped), of latents as `encode` returns them.

        Raises OsjaxError for an array that is no latent; progress as in `moments`.
        """
        check_video(z_bthwc, self.config.z_channels, "latent to decode")
        z_bthwc = z_bthwc.astype(jnp.float32) / self.config.scale_factor + self.config.shift_factor
        return _frame_by_frame(self.decoder, z_bthwc, progress)


def _frame_by_frame(network: Encoder | Decoder, x_bthwc: jax.Array, progress: Progress | None) -> jax.Array:
    """Frames as videos of one frame, which is what keeps the norms and the attention of each to itself."""
    b, t = x_bthwc.shape[:2]
    out = run_network(network, x_bthwc.reshape(b * t, 1, *x_bthwc.shape[2:]))
    if progress is not None:
        out = jax.block_until_ready(out)
        progress(b * t, b * t)
    return out.reshape(b, t, *out.shape[2:])
