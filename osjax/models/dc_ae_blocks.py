"""Blocks of the deep-compression autoencoder (Chen et al. 2024) for videos, with attention as in EfficientViT.

B batch, T/H/W frames/height/width, C channels, N = T·H·W positions, G heads, D head width.
Nothing here is causal: borders are zeros on both sides of every axis.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from osjax.models.conv3d import Factors
from osjax.models.layers import RMSNorm

HEAD_WIDTH = 32  # of the attention
EXPANSION = 4  # of the gated unit
AGGREGATION = 5  # side of the neighbourhood that a second set of queries, keys and values is gathered from
_NORM_EPSILON = 1e-5
_ATTENTION_EPSILON = 1e-15  # in the denominator: where no key answers a query, the result is 0


class Norm(RMSNorm):
    """RMSNorm over the channels with a learned scale and bias."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        super().__init__(channels, rngs=rngs, dtype=dtype, epsilon=_NORM_EPSILON)
        self.bias = nnx.Param(jnp.zeros((channels,), dtype))

    def __call__(self, x: jax.Array) -> jax.Array:
        return super().__call__(x) + self.bias[...]


class ResBlock(nnx.Module):
    """x + norm(conv(silu(conv(x))))."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.conv1 = conv(channels, channels, rngs=rngs, dtype=dtype)
        self.conv2 = conv(channels, channels, use_bias=False, rngs=rngs, dtype=dtype)
        self.norm = Norm(channels, rngs=rngs, dtype=dtype)

    def __call__(self, x_bthwc: jax.Array) -> jax.Array:
        return x_bthwc + self.norm(self.conv2(jax.nn.silu(self.conv1(x_bthwc))))


class LinearAttention(nnx.Module):
    """x + norm(project(attention)), where relu takes the place of softmax, so that the cost grows with N only.

    Half of the heads attend among positions, the other half among aggregates of their neighbourhoods (Cai et al. 2023,
    "EfficientViT", figure 2).
    """

    def __init__(self, channels: int, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        heads = channels // HEAD_WIDTH
        inner = 3 * heads * HEAD_WIDTH  # channels lie head by head, and in each queries, keys, values
        self.qkv = _pointwise(channels, inner, use_bias=False, rngs=rngs, dtype=dtype)
        self.gather = conv(inner, inner, AGGREGATION, groups=inner, use_bias=False, rngs=rngs, dtype=dtype)
        # One matrix for the queries of a head, one for its keys, one for its values.
        self.mix = nnx.Einsum(
            "...gc,gcd->...gd", (3 * heads, HEAD_WIDTH, HEAD_WIDTH), dtype=dtype, param_dtype=dtype, rngs=rngs
        )
        self.project = _pointwise(2 * heads * HEAD_WIDTH, channels, use_bias=False, rngs=rngs, dtype=dtype)
        self.norm = Norm(channels, rngs=rngs, dtype=dtype)

    def __call__(self, x_bthwc: jax.Array) -> jax.Array:
        qkv_bthwc = self.qkv(x_bthwc)
        parts_bthwgd = self.gather(qkv_bthwc).reshape(*qkv_bthwc.shape[:-1], -1, HEAD_WIDTH)
        both = jnp.concatenate([qkv_bthwc, self.mix(parts_bthwgd).reshape(qkv_bthwc.shape)], axis=-1)
        b, t, h, w, _ = both.shape
        q_bngd, k_bngd, v_bngd = jnp.moveaxis(both.reshape(b, t * h * w, -1, 3, HEAD_WIDTH), 3, 0)
        o_bthwc = relu_attention(q_bngd, k_bngd, v_bngd).reshape(b, t, h, w, -1)
        return x_bthwc + self.norm(self.project(o_bthwc.astype(x_bthwc.dtype)))


class GatedUnit(nnx.Module):
    """x + norm(narrow(h · silu(g))), where h and g are the halves of a depthwise convolution of widened channels."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        inner = EXPANSION * channels
        self.widen = _pointwise(channels, 2 * inner, rngs=rngs, dtype=dtype)
        self.depthwise = conv(2 * inner, 2 * inner, groups=2 * inner, rngs=rngs, dtype=dtype)
        self.narrow = _pointwise(inner, channels, use_bias=False, rngs=rngs, dtype=dtype)
        self.norm = Norm(channels, rngs=rngs, dtype=dtype)

    def __call__(self, x_bthwc: jax.Array) -> jax.Array:
        h_bthwc, gate_bthwc = jnp.split(self.depthwise(jax.nn.silu(self.widen(x_bthwc))), 2, axis=-1)
        return x_bthwc + self.norm(self.narrow(h_bthwc * jax.nn.silu(gate_bthwc)))


class AttentionBlock(nnx.Module):
    """Linear attention, then the gated unit."""

    def __init__(self, channels: int, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.attention = LinearAttention(channels, rngs=rngs, dtype=dtype)
        self.unit = GatedUnit(channels, rngs=rngs, dtype=dtype)

    def __call__(self, x_bthwc: jax.Array) -> jax.Array:
        return self.unit(self.attention(x_bthwc))


class Downsample(nnx.Module):
    """A strided convolution, plus the average of channels that hold what each step leaves out.

    Height and width, which must be even, are halved, and with `time` the frames too, but a single frame stays.
    """

    def __init__(self, c_in: int, c_out: int, *, time: bool, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.time = time
        self.conv = conv(c_in, c_out, stride=(1 + time, 2, 2), rngs=rngs, dtype=dtype)

    def __call__(self, x_bthwc: jax.Array) -> jax.Array:
        factors = (1 + (self.time and x_bthwc.shape[1] > 1), 2, 2)
        return self.conv(x_bthwc) + average_channels(space_to_channels(x_bthwc, factors), self.conv.out_features)


class Upsample(nnx.Module):
    """Nearest upsampling and a convolution, plus copies of channels laid out in the new places.

    Height and width are doubled, and with `time` the frames too, but a single frame stays.
    """

    def __init__(self, c_in: int, c_out: int, *, time: bool, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.time = time
        self.conv = conv(c_in, c_out, rngs=rngs, dtype=dtype)

    def __call__(self, x_bthwc: jax.Array) -> jax.Array:
        factors = (1 + (self.time and x_bthwc.shape[1] > 1), 2, 2)
        nearest_bthwc = functools.reduce(lambda x, axis: jnp.repeat(x, factors[axis - 1], axis), (1, 2, 3), x_bthwc)
        copies_bthwc = repeat_channels(x_bthwc, self.conv.out_features * math.prod(factors))
        return self.conv(nearest_bthwc) + channels_to_space(copies_bthwc, factors)


def conv(
    c_in: int,
    c_out: int,
    size: int = 3,
    *,
    stride: Factors = (1, 1, 1),
    groups: int = 1,
    use_bias: bool = True,
    rngs: nnx.Rngs,
    dtype: jnp.dtype,
) -> nnx.Conv:
    """A cubic convolution with size // 2 zeros on every side."""
    return nnx.Conv(
        c_in,
        c_out,
        (size,) * 3,
        strides=stride,
        padding=((size // 2, size // 2),) * 3,
        feature_group_count=groups,
        use_bias=use_bias,
        dtype=dtype,
        param_dtype=dtype,
        rngs=rngs,
    )


def relu_attention(q_bngd: jax.Array, k_bngd: jax.Array, v_bngd: jax.Array) -> jax.Array:
    """softmax(q·k)·v with relu(q)·relu(k) for exp(q·k); float32 inside, and returns it."""
    exact = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    q_bngd, k_bngd = (jax.nn.relu(x.astype(jnp.float32)) for x in (q_bngd, k_bngd))
    kv_bgde = exact("bngd,bnge->bgde", k_bngd, v_bngd.astype(jnp.float32))
    weight_bng = exact("bngd,bgd->bng", q_bngd, k_bngd.sum(1))
    return exact("bngd,bgde->bnge", q_bngd, kv_bgde) / (weight_bng[..., None] + _ATTENTION_EPSILON)


def space_to_channels(x_bthwc: jax.Array, factors: Factors) -> jax.Array:
    """[B, T·i, H·j, W·k, C] -> [B, T, H, W, C·i·j·k], the offsets within a cell counted after the channel."""
    b, t, h, w, c = x_bthwc.shape
    i, j, k = factors
    cells = x_bthwc.reshape(b, t // i, i, h // j, j, w // k, k, c).transpose(0, 1, 3, 5, 7, 2, 4, 6)
    return cells.reshape(b, t // i, h // j, w // k, c * i * j * k)


def channels_to_space(x_bthwc: jax.Array, factors: Factors) -> jax.Array:
    """The inverse of `space_to_channels`."""
    b, t, h, w, c = x_bthwc.shape
    i, j, k = factors
    cells = x_bthwc.reshape(b, t, h, w, c // (i * j * k), i, j, k).transpose(0, 1, 5, 2, 6, 3, 7, 4)
    return cells.reshape(b, t * i, h * j, w * k, c // (i * j * k))


def average_channels(x_bthwc: jax.Array, channels: int) -> jax.Array:
    """Averages of neighbouring channels, so many that `channels` are left."""
    return x_bthwc.reshape(*x_bthwc.shape[:-1], channels, -1).mean(-1)


def repeat_channels(x_bthwc: jax.Array, channels: int) -> jax.Array:
    """Each channel so many times in a row that there are `channels`."""
    return jnp.repeat(x_bthwc, channels // x_bthwc.shape[-1], axis=-1)


def _pointwise(c_in: int, c_out: int, *, use_bias: bool = True, rngs: nnx.Rngs, dtype: jnp.dtype) -> nnx.Linear:
    """A 1x1x1 convolution."""
    return nnx.Linear(c_in, c_out, use_bias=use_bias, dtype=dtype, param_dtype=dtype, rngs=rngs)
