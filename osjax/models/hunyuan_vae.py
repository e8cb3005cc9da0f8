"""The causal 3D VAE of HunyuanVideo, as Open-Sora 2.0 uses it.

B batch, T/H/W frames/height/width (pixels outside, latents inside), C channels, N = H·W positions of a frame.
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
from osjax.models.conv3d import CausalConv3D, Factors, group_norm, upsample_nearest_causal
from osjax.models.tiling import AxisTiles, Progress, Tiling, apply_tiled

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "mish": jax.nn.mish,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "relu": jax.nn.relu,
}


@dataclasses.dataclass(frozen=True)
class HunyuanVAEConfig:
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
    def encode_tiling(self) -> Tiling:
        """Tiles of the video."""
        return self._tiling(lambda pixels, latents: (pixels, latents))

    @property
    def decode_tiling(self) -> Tiling:
        """Tiles of the latents."""
        return self._tiling(lambda pixels, latents: (latents, pixels))

    def _tiling(self, order: Callable[[int, int], tuple[int, int]]) -> Tiling:
        # The reference takes the latent side of a tile from the number of levels, its latent frames from the ratio.
        side = order(self.sample_size, self.sample_size // 2 ** (len(self.block_out_channels) - 1))
        frames = order(self.sample_tsize, self.sample_tsize // self.time_compression_ratio)
        return Tiling(
            time=AxisTiles(*frames, self.tile_overlap_factor, causal=True) if self.use_temporal_tiling else None,
            space=AxisTiles(*side, self.tile_overlap_factor) if self.use_spatial_tiling else None,
        )


class ResnetBlock(nnx.Module):
    """x + conv(act(norm(conv(act(norm(x)))))), with a pointwise projection of x where the width changes."""

    def __init__(self, c_in: int, c_out: int, config: HunyuanVAEConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.act = ACTIVATIONS[config.act_fn]
        self.norm1 = group_norm(c_in, config.norm_num_groups, rngs=rngs, dtype=dtype)
        self.conv1 = CausalConv3D(c_in, c_out, rngs=rngs, dtype=dtype)
        self.norm2 = group_norm(c_out, config.norm_num_groups, rngs=rngs, dtype=dtype)
        self.conv2 = CausalConv3D(c_out, c_out, rngs=rngs, dtype=dtype)
        self.conv_shortcut = _pointwise(c_in, c_out, rngs=rngs, dtype=dtype) if c_in != c_out else None

    def __call__(self, x_bthwc: jax.Array) -> jax.Array:
        h_bthwc = self.conv1(self.act(self.norm1(x_bthwc)))
        h_bthwc = self.conv2(self.act(self.norm2(h_bthwc)))
        return h_bthwc + (x_bthwc if self.conv_shortcut is None else self.conv_shortcut(x_bthwc))


class FrameCausalAttention(nnx.Module):
    """x + single-head attention in which a position sees all positions of its own and earlier frames."""

    def __init__(self, channels: int, groups: int, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.group_norm = group_norm(channels, groups, rngs=rngs, dtype=dtype)
        self.to_q = _pointwise(channels, channels, rngs=rngs, dtype=dtype)
        self.to_k = _pointwise(channels, channels, rngs=rngs, dtype=dtype)
        self.to_v = _pointwise(channels, channels, rngs=rngs, dtype=dtype)
        self.to_out = _pointwise(channels, channels, rngs=rngs, dtype=dtype)

    def __call__(self, x_bthwc: jax.Array) -> jax.Array:
        b, t, h, w, c = x_bthwc.shape
        h_btnc = self.group_norm(x_bthwc).reshape(b, t, h * w, c)
        q_btnc, k_btnc, v_btnc = self.to_q(h_btnc), self.to_k(h_btnc), self.to_v(h_btnc)

        def attend(frame: jax.Array, q_bnc: jax.Array) -> jax.Array:
            # Scores of one query frame: the mask over all pairs of positions would take (T·N)² elements.
            s_bntm = jnp.einsum("bnc,btmc->bntm", q_bnc, k_btnc, preferred_element_type=jnp.float32) * c**-0.5
            s_bntm = jnp.where((jnp.arange(t) <= frame)[:, None], s_bntm, -jnp.inf)
            p_bntm = jax.nn.softmax(s_bntm, axis=(-2, -1)).astype(v_btnc.dtype)
            return jnp.einsum("bntm,btmc->bnc", p_bntm, v_btnc)

        o_tbnc = jax.lax.map(lambda args: attend(*args), (jnp.arange(t), q_btnc.swapaxes(0, 1)))
        return x_bthwc + self.to_out(o_tbnc.swapaxes(0, 1)).reshape(x_bthwc.shape)


class MidBlock(nnx.Module):
    """Residual block, attention if the config has it, residual block."""

    def __init__(self, config: HunyuanVAEConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        c = config.block_out_channels[-1]
        self.resnets = nnx.List([ResnetBlock(c, c, config, rngs=rngs, dtype=dtype) for _ in range(2)])
        self.attention = (
            FrameCausalAttention(c, config.norm_num_groups, rngs=rngs, dtype=dtype)
            if config.mid_block_add_attention
            else None
        )

    def __call__(self, x_bthwc: jax.Array) -> jax.Array:
        first, last = self.resnets
        x_bthwc = first(x_bthwc)
        if self.attention is not None:
            x_bthwc = self.attention(x_bthwc)
        return last(x_bthwc)


class Level(nnx.Module):
    """Residual blocks at one resolution, then the way to the next: a strided convolution, or upsampling and one."""

    def __init__(
        self,
        widths: tuple[int, int],
        depth: int,
        config: HunyuanVAEConfig,
        *,
        down: Factors = (1, 1, 1),
        up: Factors = (1, 1, 1),
        rngs: nnx.Rngs,
        dtype: jnp.dtype,
    ):
        c_in, c = widths
        self.up = up
        self.resnets = nnx.List(
            [ResnetBlock(c if i else c_in, c, config, rngs=rngs, dtype=dtype) for i in range(depth)]
        )
        resamples = max(*down, *up) > 1
        self.resample = CausalConv3D(c, c, stride=down, rngs=rngs, dtype=dtype) if resamples else None

    def __call__(self, x_bthwc: jax.Array) -> jax.Array:
        for resnet in self.resnets:
            x_bthwc = resnet(x_bthwc)
        if self.resample is None:
            return x_bthwc
        return self.resample(upsample_nearest_causal(x_bthwc, self.up))


class Encoder(nnx.Module):
    """[B, T, H, W, in_channels] -> mean | log-variance [B, t, h, w, 2 · latent_channels]."""

    def __init__(self, config: HunyuanVAEConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        widths = config.block_out_channels
        c_out = 2 * config.latent_channels
        self.conv_in = CausalConv3D(config.in_channels, widths[0], rngs=rngs, dtype=dtype)
        self.levels = nnx.List(
            [
                Level(pair, config.layers_per_block, config, down=factors, rngs=rngs, dtype=dtype)
                for pair, factors in zip(_steps(widths), config.level_factors, strict=True)
            ]
        )
        self.mid_block = MidBlock(config, rngs=rngs, dtype=dtype)
        self.norm_out = group_norm(widths[-1], config.norm_num_groups, rngs=rngs, dtype=dtype)
        self.conv_out = CausalConv3D(widths[-1], c_out, rngs=rngs, dtype=dtype)
        self.quant_conv = _pointwise(c_out, c_out, rngs=rngs, dtype=dtype)

    def __call__(self, x_bthwc: jax.Array) -> jax.Array:
        x_bthwc = self.conv_in(x_bthwc)
        for level in self.levels:
            x_bthwc = level(x_bthwc)
        x_bthwc = self.mid_block(x_bthwc)
        return self.quant_conv(self.conv_out(jax.nn.silu(self.norm_out(x_bthwc))))


class Decoder(nnx.Module):
    """[B, t, h, w, latent_channels] -> [B, T, H, W, out_channels]."""

    def __init__(self, config: HunyuanVAEConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        widths = config.block_out_channels[::-1]
        c_in = config.latent_channels
        self.post_quant_conv = _pointwise(c_in, c_in, rngs=rngs, dtype=dtype)
        self.conv_in = CausalConv3D(c_in, widths[0], rngs=rngs, dtype=dtype)
        self.mid_block = MidBlock(config, rngs=rngs, dtype=dtype)
        self.levels = nnx.List(
            [
                Level(pair, config.layers_per_block + 1, config, up=factors, rngs=rngs, dtype=dtype)
                for pair, factors in zip(_steps(widths), config.level_factors, strict=True)
            ]
        )
        self.norm_out = group_norm(widths[-1], config.norm_num_groups, rngs=rngs, dtype=dtype)
        self.conv_out = CausalConv3D(widths[-1], config.out_channels, rngs=rngs, dtype=dtype)

    def __call__(self, z_bthwc: jax.Array) -> jax.Array:
        x_bthwc = self.mid_block(self.conv_in(self.post_quant_conv(z_bthwc)))
        for level in self.levels:
            x_bthwc = level(x_bthwc)
        return self.conv_out(jax.nn.silu(self.norm_out(x_bthwc)))


class HunyuanVAE(nnx.Module):
    """The autoencoder. Its methods run tile by tile, each tile in one jitted call per tile shape."""

    def __init__(self, config: HunyuanVAEConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype = jnp.float32):
        self.config = config
        self.encoder = Encoder(config, rngs=rngs, dtype=dtype)
        self.decoder = Decoder(config, rngs=rngs, dtype=dtype)

    def with_tiling(self, *, spatial: bool, temporal: bool) -> HunyuanVAE:
        """The same model (its arrays are shared, compiled tiles are reused) with tiling switched as given."""
        other = jax.tree.map(lambda leaf: leaf, self)
        other.config = dataclasses.replace(self.config, use_spatial_tiling=spatial, use_temporal_tiling=temporal)
        return other

    def moments(self, x_bthwc: jax.Array, progress: Progress | None = None) -> jax.Array:
        """Posterior of a video in [-1, 1]: mean | log-variance (not clamped) on the last axis, [B, t, h, w, 2·C].

        progress: called with (tiles done, tiles in all); for use outside jit.
        Raises OsjaxError for an array that is no video of `in_channels` channels.
        """
        _check_shape(x_bthwc, self.config.in_channels, "video to encode")
        run = functools.partial(_run, self.encoder, one_by_one=self.config.use_slicing)
        return apply_tiled(run, x_bthwc, self.config.encode_tiling, progress)

    def encode(self, x_bthwc: jax.Array, key: jax.Array | None = None, progress: Progress | None = None) -> jax.Array:
        """Scaled latents [B, t, h, w, C] of a video: the posterior's mode, or a sample of it when a key is given.

        t, h and w are T, H and W over the compression ratios, rounded up. Errors and progress as in `moments`.
        """
        moments_bthwc = self.moments(x_bthwc, progress)
        z_bthwc, logvar_bthwc = jnp.split(moments_bthwc.astype(jnp.float32), 2, axis=-1)
        if key is not None:
            deviation_bthwc = jnp.exp(0.5 * jnp.clip(logvar_bthwc, -30.0, 20.0))
            z_bthwc = z_bthwc + deviation_bthwc * jax.random.normal(key, z_bthwc.shape)
        return (self.config.scale_factor * (z_bthwc - self.config.shift_factor)).astype(moments_bthwc.dtype)

    def decode(self, z_bthwc: jax.Array, progress: Progress | None = None) -> jax.Array:
        """Video [B, T, H, W, out_channels], about [-1, 1] (not clamped), of scaled latents as `encode` returns them.

        T is 1 + (t - 1) · ratio. Raises OsjaxError for an array that is no latent; progress as in `moments`.
        """
        _check_shape(z_bthwc, self.config.latent_channels, "latent to decode")
        z_bthwc = z_bthwc.astype(jnp.float32) / self.config.scale_factor + self.config.shift_factor
        run = functools.partial(_run, self.decoder, one_by_one=self.config.use_slicing)
        return apply_tiled(run, z_bthwc, self.config.decode_tiling, progress)


@functools.partial(jax.jit, static_argnames="one_by_one")
def _run(network: Encoder | Decoder, x_bthwc: jax.Array, one_by_one: bool) -> jax.Array:
    """The network on one tile. It takes no whole model, so that a change of tiling compiles nothing anew."""
    if one_by_one:
        return jax.lax.map(lambda x_thwc: network(x_thwc[None])[0], x_bthwc)
    return network(x_bthwc)


def _pointwise(c_in: int, c_out: int, *, rngs: nnx.Rngs, dtype: jnp.dtype) -> nnx.Linear:
    """A 1x1x1 convolution."""
    return nnx.Linear(c_in, c_out, dtype=dtype, param_dtype=dtype, rngs=rngs)


def _steps(widths: tuple[int, ...]) -> list[tuple[int, int]]:
    """(width before, width of) each level."""
    return list(zip((widths[0], *widths), widths, strict=False))


def _check_shape(x: jax.Array, channels: int, what: str) -> None:
    if x.ndim != 5 or x.shape[-1] != channels or 0 in x.shape:
        raise OsjaxError(
            f"the {what} has shape {x.shape}: give [batch, time, height, width, {channels}], none of them 0"
        )
