"""Video DC-AE: a deterministic autoencoder that takes 32 x 32 pixels of 4 frames to one latent (Chen et al. 2024).

B batch, T/H/W frames/height/width (pixels outside, latents inside), C channels.
Videos are in [-1, 1]. Nothing is causal: t latents are 4·t frames, but a network that is given one frame gives one.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from osjax.errors import OsjaxError
from osjax.models import dc_ae_blocks as blocks
from osjax.models.resnet_vae import run_network
from osjax.models.tiling import (
    TIME,
    AxisTiles,
    Order,
    Progress,
    TiledConfig,
    TiledModel,
    Tiling,
    apply_tiled,
    check_video,
)


@dataclasses.dataclass(frozen=True)
class Stage:
    """depth blocks of one width. time: whether the frames, too, are resampled between this stage and the next."""

    width: int
    depth: int
    attention: bool
    time: bool


@dataclasses.dataclass(frozen=True)
class DCAEConfig(TiledConfig):
    """Options of the published model.

    Of encoder and decoder, each stage from the pixels' to the latents': its width, its number of blocks, whether these
    are attention blocks (else residual convolutions), and whether time is resampled between it and the next.
    scaling_factor: what latents are divided by when they are made; None: nothing.
    spatial_tile_size, temporal_tile_size: side and frames of a tile, in pixels; tile_overlap_factor: share of it that
        overlaps.
    """

    in_channels: int = 3
    latent_channels: int = 128
    encoder_widths: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024)
    encoder_depths: tuple[int, ...] = (2, 2, 2, 3, 3, 3)
    encoder_attention: tuple[bool, ...] = (False, False, False, True, True, True)
    encoder_time: tuple[bool, ...] = (False, False, False, True, True, False)
    decoder_widths: tuple[int, ...] = (128, 256, 512, 512, 1024, 1024)
    decoder_depths: tuple[int, ...] = (3, 3, 3, 3, 3, 3)
    decoder_attention: tuple[bool, ...] = (False, False, False, True, True, True)
    decoder_time: tuple[bool, ...] = (False, False, False, True, True, False)
    scaling_factor: float | None = None
    use_spatial_tiling: bool = False
    use_temporal_tiling: bool = False
    spatial_tile_size: int = 256
    temporal_tile_size: int = 32
    tile_overlap_factor: float = 0.25

    def __post_init__(self) -> None:
        for name in ("encoder", "decoder"):
            _check_stages(name, _stages(self, name), self.latent_channels)
        ratios = [(len(stages), sum(stage.time for stage in stages[:-1])) for stages in (self.encoder, self.decoder)]
        if ratios[0] != ratios[1]:
            raise OsjaxError("encoder and decoder of the DC-AE compress differently: give both the same stages")
        if self.scaling_factor == 0:
            raise OsjaxError("scaling_factor is 0, so latents hold nothing: use another value, or none")
        _ = self.encode_tiling, self.decode_tiling  # tiles that cannot advance are an error here, not in mid-video

    @property
    def encoder(self) -> tuple[Stage, ...]:
        """Stages of the encoder, in the order in which they run."""
        return _stages(self, "encoder")

    @property
    def decoder(self) -> tuple[Stage, ...]:
        """Stages of the decoder, the last to run first."""
        return _stages(self, "decoder")

    @property
    def spatial_compression_ratio(self) -> int:
        """Pixels per latent along height and along width."""
        return 2 ** (len(self.encoder_widths) - 1)

    @property
    def time_compression_ratio(self) -> int:
        """Frames per latent, but for single frames."""
        return 2 ** sum(self.encoder_time[:-1])

    @property
    def causal(self) -> bool:
        """The first frame is as any other: ratio · n frames are n latents."""
        return False

    def _tiling(self, order: Order) -> Tiling:
        side = order(self.spatial_tile_size, self.spatial_tile_size // self.spatial_compression_ratio)
        frames = order(self.temporal_tile_size, self.temporal_tile_size // self.time_compression_ratio)
        return Tiling(
            time=AxisTiles(*frames, self.tile_overlap_factor) if self.use_temporal_tiling else None,
            space=AxisTiles(*side, self.tile_overlap_factor) if self.use_spatial_tiling else None,
        )

    def latent_frames(self, frames: int) -> int:
        """Latents of a clip, along time.

        Raises OsjaxError, naming the nearest length, for a clip that cannot be encoded, or that `decode` would not give
        back whole: a tile of one latent becomes one frame.
        """
        if not self._comes_back(frames):
            near = filter(self._comes_back, range(1, frames + 2 * self.temporal_tile_size))
            nearest = min(near, key=lambda n: abs(n - frames))
            raise OsjaxError(f"{frames} frames would not come back from the autoencoder: ask for {nearest}")
        return max(1, frames // self.time_compression_ratio)

    def _comes_back(self, frames: int) -> bool:
        """Whether encoding and decoding, tile by tile, keep the length; a single frame always does."""
        ratio = self.time_compression_ratio
        tiles = self.encode_tiling.lengths(frames, 1, 1)[0]
        latents = _sum_of_tiles(self.encode_tiling.time, tiles, self.shrunk)
        if not all(map(self.shrunk, tiles)) or latents != max(1, frames // ratio):
            return False
        tiles = self.decode_tiling.lengths(latents, 1, 1)[0]
        return frames == _sum_of_tiles(self.decode_tiling.time, tiles, lambda n: n * ratio if n > 1 else 1)

    def shrunk(self, frames: int) -> int:
        """Latents of one tile of so many frames: halved time and again, but a single frame stays; 0 if one is odd."""
        for _ in range(sum(self.encoder_time[:-1])):
            if frames > 1 and frames % 2:
                return 0
            frames = max(1, frames // 2)
        return frames


class Encoder(nnx.Module):
    """[B, T, H, W, in_channels] -> [B, t, h, w, latent_channels]."""

    def __init__(self, config: DCAEConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        stages = config.encoder
        self.conv_in = blocks.conv(config.in_channels, stages[0].width, rngs=rngs, dtype=dtype)
        self.stages = nnx.List([_make_blocks(stage, rngs=rngs, dtype=dtype) for stage in stages])
        self.downsamples = nnx.List(
            [
                blocks.Downsample(stage.width, deeper.width, time=stage.time, rngs=rngs, dtype=dtype)
                for stage, deeper in itertools.pairwise(stages)
            ]
        )
        self.conv_out = blocks.conv(stages[-1].width, config.latent_channels, rngs=rngs, dtype=dtype)

    def __call__(self, x_bthwc: jax.Array) -> jax.Array:
        x_bthwc = self.conv_in(x_bthwc)
        for stage, downsample in zip(self.stages, [*self.downsamples, None], strict=True):
            for block in stage:
                x_bthwc = block(x_bthwc)
            if downsample is not None:
                x_bthwc = downsample(x_bthwc)
        return self.conv_out(x_bthwc) + blocks.average_channels(x_bthwc, self.conv_out.out_features)


class Decoder(nnx.Module):
    """[B, t, h, w, latent_channels] -> [B, T, H, W, in_channels]. Its stages run from the last to the first."""

    def __init__(self, config: DCAEConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        stages = config.decoder
        self.conv_in = blocks.conv(config.latent_channels, stages[-1].width, rngs=rngs, dtype=dtype)
        self.stages = nnx.List([_make_blocks(stage, rngs=rngs, dtype=dtype) for stage in stages])
        self.upsamples = nnx.List(
            [
                blocks.Upsample(deeper.width, stage.width, time=stage.time, rngs=rngs, dtype=dtype)
                for stage, deeper in itertools.pairwise(stages)
            ]
        )
        self.norm_out = blocks.Norm(stages[0].width, rngs=rngs, dtype=dtype)
        self.conv_out = blocks.conv(stages[0].width, config.in_channels, rngs=rngs, dtype=dtype)

    def __call__(self, z_bthwc: jax.Array) -> jax.Array:
        x_bthwc = self.conv_in(z_bthwc) + blocks.repeat_channels(z_bthwc, self.conv_in.out_features)
        for stage, upsample in zip(reversed(self.stages), [None, *reversed(self.upsamples)], strict=True):
            if upsample is not None:
                x_bthwc = upsample(x_bthwc)
            for block in stage:
                x_bthwc = block(x_bthwc)
        return self.conv_out(jax.nn.relu(self.norm_out(x_bthwc)))


class DCAE(TiledModel):
    """The autoencoder. Its methods run tile by tile, each tile in one jitted call per tile shape."""

    def __init__(self, config: DCAEConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype = jnp.float32):
        self.config = config
        self.encoder = Encoder(config, rngs=rngs, dtype=dtype)
        self.decoder = Decoder(config, rngs=rngs, dtype=dtype)

    def encode(self, x_bthwc: jax.Array, key: jax.Array | None = None, progress: Progress | None = None) -> jax.Array:
        """Scaled latents [B, t, h, w, C] of a video in [-1, 1].

        t, h and w are T, H and W over the compression ratios, but t is 1 for one frame. There is no posterior to
        sample: a key changes nothing. progress: called with (tiles done, tiles in all); for use outside jit.
        Raises OsjaxError for an array that is no video, or whose tiles the compression does not divide.
        """
        check_video(x_bthwc, self.config.in_channels, "video to encode")
        self._check_lengths(*x_bthwc.shape[TIME:-1])
        z_bthwc = apply_tiled(
            functools.partial(run_network, self.encoder), x_bthwc, self.config.encode_tiling, progress
        )
        return z_bthwc if self.config.scaling_factor is None else z_bthwc / self.config.scaling_factor

    def decode(self, z_bthwc: jax.Array, progress: Progress | None = None) -> jax.Array:
        """Video [B, T, H, W, in_channels], about [-1, 1] (not clamped), of scaled latents as `encode` returns them.

        T is t · ratio, but a tile of one latent becomes one frame, as with the reference: `DCAEConfig.latent_frames`
        refuses clips that would lose frames by that. Raises OsjaxError for an array that is no latent; progress as in
        `encode`.
        """
        check_video(z_bthwc, self.config.latent_channels, "latent to decode")
        z_bthwc = z_bthwc.astype(jnp.float32) * (self.config.scaling_factor or 1.0)
        return apply_tiled(functools.partial(run_network, self.decoder), z_bthwc, self.config.decode_tiling, progress)

    def _check_lengths(self, t: int, h: int, w: int) -> None:
        in_time, *in_space = self.config.encode_tiling.lengths(t, h, w)
        if not all(map(self.config.shrunk, in_time)):
            time = self.config.time_compression_ratio
            raise OsjaxError(f"a video of {t} frames cannot be encoded: use one frame, or a multiple of {time}")
        space = self.config.spatial_compression_ratio
        if any(length % space for lengths in in_space for length in lengths):
            raise OsjaxError(f"a video of {h} x {w} pixels cannot be encoded: use multiples of {space}")


def _make_blocks(stage: Stage, *, rngs: nnx.Rngs, dtype: jnp.dtype) -> nnx.List:
    block = blocks.AttentionBlock if stage.attention else blocks.ResBlock
    return nnx.List([block(stage.width, rngs=rngs, dtype=dtype) for _ in range(stage.depth)])


def _stages(config: DCAEConfig, name: str) -> tuple[Stage, ...]:
    lists = [getattr(config, f"{name}_{what}") for what in ("widths", "depths", "attention", "time")]
    if len({len(each) for each in lists}) != 1 or not lists[0]:
        raise OsjaxError(
            f"{name}_widths, _depths, _attention and _time differ in length: give one value for each stage"
        )
    return tuple(Stage(*values) for values in zip(*lists, strict=True))


def _check_stages(name: str, stages: tuple[Stage, ...], latent_channels: int) -> None:
    """Raises OsjaxError for stages that make no network, or whose shortcuts do not divide."""
    if any(stage.depth < 1 or stage.width < 1 for stage in stages):
        raise OsjaxError(f"a stage of the {name} has no blocks or no channels: give each at least one")
    if any(stage.attention and stage.width < blocks.HEAD_WIDTH for stage in stages):
        raise OsjaxError(f"an attention stage of the {name} has no room for a head: use {blocks.HEAD_WIDTH} channels")
    if latent_channels < 1 or stages[-1].width % latent_channels:
        raise OsjaxError(
            f"{latent_channels} latent channels do not divide the {name}'s last width: use a divisor of it"
        )
    for stage, deeper in itertools.pairwise(stages):
        if 4 * stage.width % deeper.width:
            raise OsjaxError(
                f"{name} widths {stage.width}, {deeper.width} have no shortcut: let the second divide 4 times the first"
            )


def _sum_of_tiles(axis: AxisTiles | None, tiles: list[int], become: Callable[[int], int]) -> int:
    """Length of the output along an axis that is cut into `tiles`, where one of n becomes `become(n)`."""
    return sum(become(n) if len(tiles) == 1 else min(axis.keep, become(n)) for n in tiles)
