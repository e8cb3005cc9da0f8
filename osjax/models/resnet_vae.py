"""Autoencoders of residual convolutions: what the Hunyuan VAE and FLUX's autoencoder have in common.

B batch, T/H/W frames/height/width (pixels outside, latents inside), C channels, N = H·W positions of a frame.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from osjax.models.conv3d import Factors, GroupNorm, VideoConv, group_norm
from osjax.models.layers import in_range


@dataclasses.dataclass(frozen=True)
class Arrangement:
    """What encoder and decoder are made of.

    conv: makes a convolution of 3 x 3 (x 3) that keeps the size but for its stride, called as
        `conv(c_in, c_out, stride=factors, rngs=rngs, dtype=dtype)`.
    act: of the residual blocks; groups: of the norms; attention: whether the middle has it.
    widths: of each level, from the pixels' to the latents'; depth: residual blocks of a level of the encoder (the
        decoder has one more).
    factors: (time, height, width) resampling after each level, the same for encoder and decoder, each from its input.
    quant_conv: whether pointwise convolutions end the encoder and begin the decoder.
    """

    conv: Callable[..., VideoConv]
    act: Callable[[jax.Array], jax.Array]
    groups: int
    attention: bool
    widths: tuple[int, ...]
    depth: int
    factors: tuple[Factors, ...]
    quant_conv: bool
    in_channels: int
    out_channels: int
    latent_channels: int


class ResnetBlock(nnx.Module):
    """x + conv(act(norm(conv(act(norm(x)))))), with a pointwise projection of x where the width changes."""

    def __init__(self, c_in: int, c_out: int, parts: Arrangement, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.act = parts.act
        self.norm1 = group_norm(c_in, parts.groups, rngs=rngs, dtype=dtype)
        self.conv1 = parts.conv(c_in, c_out, rngs=rngs, dtype=dtype)
        self.norm2 = group_norm(c_out, parts.groups, rngs=rngs, dtype=dtype)
        self.conv2 = parts.conv(c_out, c_out, rngs=rngs, dtype=dtype)
        self.conv_shortcut = _pointwise(c_in, c_out, rngs=rngs, dtype=dtype) if c_in != c_out else None

    def __call__(self, x_bthwc: jax.Array) -> jax.Array:
        residual_bthwc = x_bthwc if self.conv_shortcut is None else self.conv_shortcut(x_bthwc)
        h_bthwc = in_range(self.conv1(x_bthwc, before=self._activated(self.norm1, x_bthwc)))
        return in_range(self.conv2(h_bthwc, residual_bthwc, before=self._activated(self.norm2, h_bthwc)))

    def _activated(self, norm: GroupNorm, x_bthwc: jax.Array) -> Callable[[jax.Array], jax.Array]:
        normalised = norm.fitted(x_bthwc)
        return lambda x_bthwc: self.act(normalised(x_bthwc))


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
    """Residual block, attention if the arrangement has it, residual block."""

    def __init__(self, parts: Arrangement, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        c = parts.widths[-1]
        self.resnets = nnx.List([ResnetBlock(c, c, parts, rngs=rngs, dtype=dtype) for _ in range(2)])
        self.attention = FrameCausalAttention(c, parts.groups, rngs=rngs, dtype=dtype) if parts.attention else None

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
        parts: Arrangement,
        *,
        down: Factors = (1, 1, 1),
        up: Factors = (1, 1, 1),
        rngs: nnx.Rngs,
        dtype: jnp.dtype,
    ):
        c_in, c = widths
        self.up = up
        self.resnets = nnx.List([ResnetBlock(c if i else c_in, c, parts, rngs=rngs, dtype=dtype) for i in range(depth)])
        resamples = max(*down, *up) > 1
        self.resample = parts.conv(c, c, stride=down, rngs=rngs, dtype=dtype) if resamples else None

    def __call__(self, x_bthwc: jax.Array) -> jax.Array:
        for resnet in self.resnets:
            x_bthwc = resnet(x_bthwc)
        if self.resample is None:
            return x_bthwc
        return in_range(self.resample.of_upsampled(x_bthwc, self.up) if max(self.up) > 1 else self.resample(x_bthwc))


class Encoder(nnx.Module):
    """[B, T, H, W, in_channels] -> mean | log-variance [B, t, h, w, 2 · latent_channels]."""

    def __init__(self, parts: Arrangement, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        widths, c_out = parts.widths, 2 * parts.latent_channels
        self.conv_in = parts.conv(parts.in_channels, widths[0], rngs=rngs, dtype=dtype)
        self.levels = nnx.List(
            [
                Level(pair, parts.depth, parts, down=factors, rngs=rngs, dtype=dtype)
                for pair, factors in zip(_steps(widths), parts.factors, strict=True)
            ]
        )
        self.mid_block = MidBlock(parts, rngs=rngs, dtype=dtype)
        self.norm_out = group_norm(widths[-1], parts.groups, rngs=rngs, dtype=dtype)
        self.conv_out = parts.conv(widths[-1], c_out, rngs=rngs, dtype=dtype)
        self.quant_conv = _pointwise(c_out, c_out, rngs=rngs, dtype=dtype) if parts.quant_conv else None

    def __call__(self, x_bthwc: jax.Array) -> jax.Array:
        x_bthwc = self.conv_in(x_bthwc)
        for level in self.levels:
            x_bthwc = level(x_bthwc)
        x_bthwc = self.conv_out(jax.nn.silu(self.norm_out(self.mid_block(x_bthwc))))
        return x_bthwc if self.quant_conv is None else self.quant_conv(x_bthwc)


class Decoder(nnx.Module):
    """[B, t, h, w, latent_channels] -> [B, T, H, W, out_channels]."""

    def __init__(self, parts: Arrangement, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        widths, c_in = parts.widths[::-1], parts.latent_channels
        self.post_quant_conv = _pointwise(c_in, c_in, rngs=rngs, dtype=dtype) if parts.quant_conv else None
        self.conv_in = parts.conv(c_in, widths[0], rngs=rngs, dtype=dtype)
        self.mid_block = MidBlock(parts, rngs=rngs, dtype=dtype)
        self.levels = nnx.List(
            [
                Level(pair, parts.depth + 1, parts, up=factors, rngs=rngs, dtype=dtype)
                for pair, factors in zip(_steps(widths), parts.factors, strict=True)
            ]
        )
        self.norm_out = group_norm(widths[-1], parts.groups, rngs=rngs, dtype=dtype)
        self.conv_out = parts.conv(widths[-1], parts.out_channels, rngs=rngs, dtype=dtype)

    def __call__(self, z_bthwc: jax.Array) -> jax.Array:
        x_bthwc = z_bthwc if self.post_quant_conv is None else self.post_quant_conv(z_bthwc)
        x_bthwc = self.mid_block(self.conv_in(x_bthwc))
        for level in self.levels:
            x_bthwc = level(x_bthwc)
        return self.conv_out(jax.nn.silu(self.norm_out(x_bthwc)))


def posterior(moments_bthwc: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(mean, log-variance), each [B, t, h, w, C] in float32, of moments [B, t, h, w, 2·C].

    The log-variance is clamped to [-30, 20], as Rombach et al. 2022 do in their code.
    """
    mean_bthwc, logvar_bthwc = jnp.split(moments_bthwc.astype(jnp.float32), 2, axis=-1)
    return mean_bthwc, jnp.clip(logvar_bthwc, -30.0, 20.0)


def sample_posterior(mean_bthwc: jax.Array, logvar_bthwc: jax.Array, key: jax.Array) -> jax.Array:
    """Latents of the normal distribution with that mean and log-variance, in their shape and dtype."""
    return mean_bthwc + jnp.exp(0.5 * logvar_bthwc) * jax.random.normal(key, mean_bthwc.shape)


def posterior_latents(
    moments_bthwc: jax.Array, key: jax.Array | None, *, scale_factor: float, shift_factor: float
) -> jax.Array:
    """scale · (z - shift), where z is the mode of a posterior mean | log-variance, or a sample if a key is given.

    Computed in float32; returns the dtype of the moments.
    """
    mean_bthwc, logvar_bthwc = posterior(moments_bthwc)
    z_bthwc = mean_bthwc if key is None else sample_posterior(mean_bthwc, logvar_bthwc, key)
    return (scale_factor * (z_bthwc - shift_factor)).astype(moments_bthwc.dtype)


@functools.partial(jax.jit, static_argnames="one_by_one")
def run_network(network: nnx.Module, x_bthwc: jax.Array, one_by_one: bool = False) -> jax.Array:
    """The network on one tile; one_by_one: one video of the batch at a time.

    It takes no whole model, so that a change of tiling compiles nothing anew.
    """
    if one_by_one:
        return jax.lax.map(lambda x_thwc: network(x_thwc[None])[0], x_bthwc)
    return network(x_bthwc)


def _pointwise(c_in: int, c_out: int, *, rngs: nnx.Rngs, dtype: jnp.dtype) -> nnx.Linear:
    """A 1x1x1 convolution."""
    return nnx.Linear(c_in, c_out, dtype=dtype, param_dtype=dtype, rngs=rngs)


def _steps(widths: tuple[int, ...]) -> list[tuple[int, int]]:
    """(width before, width of) each level."""
    return list(zip((widths[0], *widths), widths, strict=False))
