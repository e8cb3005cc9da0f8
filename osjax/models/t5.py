"""The T5 v1.1 text encoder.

Axes: B batch, L tokens, C width of the residual stream, H heads, D head width, F width of the feed-forward layer.

Source: Raffel et al. 2020 (arXiv:1910.10683), with the gated feed-forward layer of Shazeer 2020 (arXiv:2002.05202).
It differs from a usual transformer in three ways that show below: q·k is not scaled, positions enter only as a learned
bias on the attention logits, and norms have a scale but no mean and no shift.
"""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from osjax.errors import OsjaxError
from osjax.models.layers import Embed, RMSNorm, stack_blocks

_LARGEST_F16 = float(jnp.finfo(jnp.float16).max)
_ACTIVATIONS = {
    "gated-gelu": functools.partial(jax.nn.gelu, approximate=True),
    "gated-silu": jax.nn.silu,
    "relu": jax.nn.relu,
}


@dataclasses.dataclass(frozen=True)
class T5Config:
    """Hyper-parameters under the names of Hugging Face's `config.json`; the defaults are google/t5-v1_1-xxl.

    Raises OsjaxError for a `feed_forward_proj` that is not one of gated-gelu, gated-silu, relu.
    """

    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10240
    num_heads: int = 64
    num_layers: int = 24
    vocab_size: int = 32128
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    feed_forward_proj: str = "gated-gelu"
    layer_norm_epsilon: float = 1e-6

    def __post_init__(self) -> None:
        if self.feed_forward_proj not in _ACTIVATIONS:
            known = ", ".join(_ACTIVATIONS)
            raise OsjaxError(f"T5 feed_forward_proj is {self.feed_forward_proj!r}: use an encoder with one of {known}")

    @property
    def is_gated(self) -> bool:
        """Whether the feed-forward layer multiplies its activation by a second projection."""
        return self.feed_forward_proj.startswith("gated-")


def relative_buckets(length: int, num_buckets: int, max_distance: int) -> np.ndarray:
    """Bucket of every (query, key) pair: int32 [L, L] with values in [0, num_buckets).

    The upper half of the buckets is for keys after the query. Of each half, the first half counts single positions and
    the rest grows logarithmically up to `max_distance`, beyond which everything shares the last bucket. In float32, as
    the reference, since rounding decides at the bucket borders. Source: Raffel et al. 2020, section 2.1.
    """
    sides = num_buckets // 2
    exact = sides // 2
    offset_ll = np.arange(length)[None, :] - np.arange(length)[:, None]
    distance_ll = np.abs(offset_ll)
    growth_ll = np.log(np.maximum(distance_ll, 1).astype(np.float32) / exact)
    far_ll = exact + (growth_ll / np.float32(math.log(max_distance / exact)) * (sides - exact)).astype(np.int32)
    bucket_ll = np.where(distance_ll < exact, distance_ll, np.minimum(far_ll, sides - 1))
    return (bucket_ll + np.where(offset_ll > 0, sides, 0)).astype(np.int32)


class T5Block(nnx.Module):
    """Self-attention and a feed-forward layer, each behind an RMS norm and added to the residual stream."""

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        linear = functools.partial(nnx.Linear, use_bias=False, dtype=dtype, param_dtype=dtype, rngs=rngs)
        linear_f32 = functools.partial(linear, preferred_element_type=jnp.float32)
        norm = functools.partial(RMSNorm, config.d_model, epsilon=config.layer_norm_epsilon, dtype=dtype, rngs=rngs)
        inner = config.num_heads * config.d_kv
        self.num_heads = config.num_heads
        self.activation = _ACTIVATIONS[config.feed_forward_proj]
        self.attention_norm = norm()
        self.q = linear_f32(config.d_model, inner)
        self.k = linear_f32(config.d_model, inner)
        self.v = linear_f32(config.d_model, inner)
        self.o = linear_f32(inner, config.d_model)
        self.mlp_norm = norm()
        wide = linear_f32 if dtype == jnp.float16 else linear  # what is between them leaves the range of float16
        self.wi = wide(config.d_model, config.d_ff)
        self.gate = wide(config.d_model, config.d_ff) if config.is_gated else None
        self.wo = linear_f32(config.d_ff, config.d_model)

    def __call__(self, states_blc: jax.Array, bias_1hll: jax.Array) -> jax.Array:
        """float32 [B, L, C] -> float32 [B, L, C]; bias_1hll is added to the attention logits."""
        x_blc = self.attention_norm(states_blc)
        q_blhd, k_blhd, v_blhd = (self._heads(project(x_blc)) for project in (self.q, self.k, self.v))
        joined_blhd = jax.nn.dot_product_attention(q_blhd, k_blhd, v_blhd, bias=bias_1hll, scale=1.0)
        states_blc = states_blc + self.o(joined_blhd.reshape(*joined_blhd.shape[:2], -1))

        x_blc = self.mlp_norm(states_blc)
        hidden_blf = self.activation(self.wi(x_blc))
        if self.gate is not None:
            hidden_blf = hidden_blf * self.gate(x_blc)
        if self.wo.dtype != jnp.float16:
            return states_blc + self.wo(hidden_blf)
        scale_bl1 = jnp.maximum(1.0, jnp.abs(hidden_blf).max(axis=-1, keepdims=True) / _LARGEST_F16)
        return states_blc + scale_bl1 * self.wo(hidden_blf / scale_bl1)

    def _heads(self, x_bli: jax.Array) -> jax.Array:
        return x_bli.reshape(*x_bli.shape[:2], self.num_heads, -1)


class T5Encoder(nnx.Module):
    """Token ids to one state per token.

    Attention and the residual stream are float32 whatever `dtype` is: logits are large where q·k is not scaled, the
    stream of the XXL model leaves the range of float16, and at a few hundred tokens it costs nothing.
    """

    def __init__(self, config: T5Config, *, rngs: nnx.Rngs, dtype: jnp.dtype = jnp.bfloat16):
        self.config = config
        self.dtype = dtype
        self.embed = Embed(config.vocab_size, config.d_model, dtype=dtype, param_dtype=dtype, rngs=rngs)
        self.relative_bias = Embed(
            config.relative_attention_num_buckets, config.num_heads, dtype=jnp.float32, param_dtype=dtype, rngs=rngs
        )
        self.blocks = stack_blocks(functools.partial(T5Block, config, dtype=dtype), config.num_layers, rngs)
        self.final_norm = RMSNorm(config.d_model, epsilon=config.layer_norm_epsilon, dtype=dtype, rngs=rngs)

    def __call__(self, ids_bl: jax.Array) -> jax.Array:
        """int32 [B, L] -> `dtype` [B, L, C]. There is no mask: padding is attended to, as in the reference."""
        bias_1hll = self._position_bias(ids_bl.shape[1])
        states_blc = self.embed(ids_bl).astype(jnp.float32)
        states_blc, _ = jax.lax.scan(lambda x, block: (block(x, bias_1hll), None), states_blc, self.blocks)
        return self.final_norm(states_blc).astype(self.dtype)

    def _position_bias(self, length: int) -> jax.Array:
        """float32 [1, H, L, L], the same for all blocks."""
        config = self.config
        buckets_ll = relative_buckets(
            length, config.relative_attention_num_buckets, config.relative_attention_max_distance
        )
        return self.relative_bias(jnp.asarray(buckets_ll)).transpose(2, 0, 1)[None]
