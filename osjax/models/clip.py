"""The text half of CLIP: one state per token, and one pooled vector per prompt.

Axes: B batch, L tokens, C width, H heads, D head width.

Source: Radford et al. 2021 (arXiv:2103.00020), section 2.4.
"""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
from flax import nnx

from osjax.errors import OsjaxError
from osjax.models.layers import Embed, stack_blocks


def quick_gelu(x: jax.Array) -> jax.Array:
    """x · sigmoid(1.702 x): the GELU approximation that OpenAI trained CLIP with (arXiv:1606.08415, section 2)."""
    return x * jax.nn.sigmoid(1.702 * x)


_ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": functools.partial(jax.nn.gelu, approximate=False)}

# Hugging Face's early CLIP configs carry this wrong end-of-text id; theirs and ours pool at the highest id then.
_LEGACY_EOS = 2


@dataclasses.dataclass(frozen=True)
class CLIPTextConfig:
    """Hyper-parameters under the names of Hugging Face's `config.json`; the defaults are openai/clip-vit-large-patch14.

    Raises OsjaxError for a `hidden_act` that is not quick_gelu or gelu, and for a width that the heads do not divide.
    """

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 77
    vocab_size: int = 49408
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    eos_token_id: int = _LEGACY_EOS

    def __post_init__(self) -> None:
        if self.hidden_act not in _ACTIVATIONS:
            raise OsjaxError(
                f"CLIP hidden_act is {self.hidden_act!r}: use an encoder with one of {', '.join(_ACTIVATIONS)}"
            )
        if self.hidden_size % self.num_attention_heads:
            raise OsjaxError(
                f"CLIP hidden_size {self.hidden_size} does not divide into {self.num_attention_heads} heads: "
                "mend num_attention_heads in its config.json"
            )


class CLIPBlock(nnx.Module):
    """Causal self-attention and an MLP, each behind a layer norm and added to the residual stream."""

    def __init__(self, config: CLIPTextConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        linear = functools.partial(nnx.Linear, dtype=dtype, param_dtype=dtype, rngs=rngs)
        linear_f32 = functools.partial(linear, preferred_element_type=jnp.float32)
        width = config.hidden_size
        self.num_heads = config.num_attention_heads
        self.activation = _ACTIVATIONS[config.hidden_act]
        self.attention_norm = _layer_norm(config, rngs, dtype)
        self.q = linear_f32(width, width)
        self.k = linear_f32(width, width)
        self.v = linear_f32(width, width)
        self.out = linear(width, width)
        self.mlp_norm = _layer_norm(config, rngs, dtype)
        self.fc1 = linear(width, config.intermediate_size)
        self.fc2 = linear(config.intermediate_size, width)

    def __call__(self, states_blc: jax.Array) -> jax.Array:
        """[B, L, C] -> [B, L, C], of the same dtype."""
        x_blc = self.attention_norm(states_blc)
        q_blhd, k_blhd, v_blhd = (self._heads(project(x_blc)) for project in (self.q, self.k, self.v))
        joined_blhd = jax.nn.dot_product_attention(q_blhd, k_blhd, v_blhd, is_causal=True)
        states_blc = states_blc + self.out(joined_blhd.reshape(states_blc.shape))
        return states_blc + self.fc2(self.activation(self.fc1(self.mlp_norm(states_blc))))

    def _heads(self, x_blc: jax.Array) -> jax.Array:
        return x_blc.reshape(*x_blc.shape[:2], self.num_heads, -1)


class CLIPText(nnx.Module):
    """Token ids to states and a pooled vector, without CLIP's projection to the space it shares with images."""

    def __init__(self, config: CLIPTextConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype = jnp.bfloat16):
        embed = functools.partial(Embed, features=config.hidden_size, dtype=dtype, param_dtype=dtype, rngs=rngs)
        self.config = config
        self.dtype = dtype
        self.token_embed = embed(config.vocab_size)
        self.position_embed = embed(config.max_position_embeddings)
        self.blocks = stack_blocks(functools.partial(CLIPBlock, config, dtype=dtype), config.num_hidden_layers, rngs)
        self.final_norm = _layer_norm(config, rngs, dtype)

    def __call__(self, ids_bl: jax.Array) -> tuple[jax.Array, jax.Array]:
        """int32 [B, L], L <= max_position_embeddings -> `dtype` states [B, L, C] and pooled [B, C], both normalized.

        Padding needs no mask: it stands behind the end-of-text token, at which the pooled vector is taken.
        """
        states_blc = self.token_embed(ids_bl) + self.position_embed(jnp.arange(ids_bl.shape[1]))
        states_blc, _ = jax.lax.scan(lambda x, block: (block(x), None), states_blc, self.blocks)
        states_blc = self.final_norm(states_blc).astype(self.dtype)
        end_b11 = self._end_of_text(ids_bl)[:, None, None]
        return states_blc, jnp.take_along_axis(states_blc, end_b11, axis=1)[:, 0]

    def _end_of_text(self, ids_bl: jax.Array) -> jax.Array:
        """Where each row ends, int32 [B]: the first of its end-of-text ids, the later ones being padding."""
        eos = self.config.eos_token_id
        return jnp.argmax(ids_bl if eos == _LEGACY_EOS else ids_bl == eos, axis=1)


def _layer_norm(config: CLIPTextConfig, rngs: nnx.Rngs, dtype: jnp.dtype) -> nnx.LayerNorm:
    return nnx.LayerNorm(
        config.hidden_size,
        epsilon=config.layer_norm_eps,
        dtype=jnp.float32,
        param_dtype=dtype,
        use_fast_variance=False,  # E[x²] - E[x]² loses half of the digits
        rngs=rngs,
    )
