"""The MMDiT of Open-Sora 2.0 and FLUX.1: double-stream blocks, then single-stream blocks, one joint attention each.

B batch, N image tokens, L text tokens, C channels of a token, F features (hidden width), P pooled-text width,
H heads, D head width, M = L + N tokens of the joint sequence (text first).

Spec: Open-Sora 2.0 technical report (Peng et al. 2025), section 3.2; the block design is FLUX.1's and MMDiT's
(Esser et al. 2024, section 4).
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from osjax.errors import OsjaxError
from osjax.models.layers import MLPEmbedder, RMSNorm, layer_norm, stack_blocks, timestep_embedding
from osjax.models.operations import BY_XLA, Operations
from osjax.models.rope import Rope, after_text

Streams = tuple[jax.Array, jax.Array]
JointAttention = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
# Whether blocks are computed again in the backward pass, or a policy of `jax.checkpoint` that says what of them is not.
Remat = bool | Callable[..., bool]
TIME_EMBEDDING_WIDTH = 256


@dataclasses.dataclass(frozen=True)
class MMDiTConfig:
    """Sizes of an MMDiT; the defaults are Open-Sora v2's 11.9 B parameters."""

    in_channels: int = 64  # channels of a packed token: latent channels · patch²
    vec_in_dim: int = 768
    context_in_dim: int = 4096
    hidden_size: int = 3072
    mlp_ratio: float = 4.0
    num_heads: int = 24
    depth: int = 19
    depth_single_blocks: int = 38
    axes_dim: tuple[int, ...] = (16, 56, 56)
    theta: float = 10_000.0
    qkv_bias: bool = True
    guidance_embed: bool = False
    cond_embed: bool = True
    patch_size: int = 2

    def __post_init__(self) -> None:
        if self.hidden_size % self.num_heads:
            raise OsjaxError(
                f"hidden_size {self.hidden_size} does not divide into {self.num_heads} heads: mend the config"
            )
        if sum(self.axes_dim) != self.head_dim or any(width % 2 for width in self.axes_dim):
            raise OsjaxError(
                f"axes_dim {self.axes_dim} must be even and sum to the head width {self.head_dim}: mend the config"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def mlp_hidden(self) -> int:
        return int(self.hidden_size * self.mlp_ratio)

    @property
    def cond_channels(self) -> int:
        """Channels of a condition token: one mask channel beside the latent's, for each pixel of the patch."""
        return self.in_channels + self.patch_size**2

    @property
    def latent_channels(self) -> int:
        return self.in_channels // self.patch_size**2


def modulated(x_bnf: jax.Array, shift_bf: jax.Array, scale_bf: jax.Array) -> jax.Array:
    """(1 + scale) · LayerNorm(x) + shift, in float32, back in x's dtype."""
    shift, scale = (v[:, None, :].astype(jnp.float32) for v in (shift_bf, scale_bf))
    return ((1.0 + scale) * layer_norm(x_bnf) + shift).astype(x_bnf.dtype)


class Modulation(nnx.Module):
    """SiLU → linear: the conditioning vector [B, F] into `parts` vectors [B, F] (shift, scale, gate, …)."""

    def __init__(self, config: MMDiTConfig, parts: int, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        size = config.hidden_size
        self.lin = nnx.Linear(size, parts * size, rngs=rngs, dtype=dtype, param_dtype=dtype)
        self.parts = parts

    def __call__(self, vec_bf: jax.Array) -> list[jax.Array]:
        return jnp.split(self.lin(jax.nn.silu(vec_bf)), self.parts, axis=-1)


class QKV(nnx.Module):
    """Projection to normalised queries and keys, and values: [B, N, F] → three of [B, N, H, D]."""

    def __init__(self, config: MMDiTConfig, *, bias: bool, rngs: nnx.Rngs, dtype: jnp.dtype):
        heads = (3, config.num_heads, config.head_dim)
        self.lin = nnx.LinearGeneral(
            config.hidden_size, heads, use_bias=bias, rngs=rngs, dtype=dtype, param_dtype=dtype
        )
        self.q_norm = RMSNorm(config.head_dim, rngs=rngs, dtype=dtype)
        self.k_norm = RMSNorm(config.head_dim, rngs=rngs, dtype=dtype)

    def __call__(self, x_bnf: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        qkv = self.lin(x_bnf)
        return self.q_norm(qkv[:, :, 0]), self.k_norm(qkv[:, :, 1]), qkv[:, :, 2]


class Stream(nnx.Module):
    """One of the two streams of a double block: its modulation, projections and MLP."""

    def __init__(self, config: MMDiTConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        size, kwargs = config.hidden_size, {"rngs": rngs, "dtype": dtype, "param_dtype": dtype}
        self.mod = Modulation(config, 6, rngs=rngs, dtype=dtype)
        self.qkv = QKV(config, bias=config.qkv_bias, rngs=rngs, dtype=dtype)
        self.proj = nnx.Linear(size, size, **kwargs)
        self.mlp_in = nnx.Linear(size, config.mlp_hidden, **kwargs)
        self.mlp_out = nnx.Linear(config.mlp_hidden, size, **kwargs)


class DoubleBlock(nnx.Module):
    """Text and image keep weights of their own and meet in one attention."""

    def __init__(self, config: MMDiTConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.img = Stream(config, rngs=rngs, dtype=dtype)
        self.txt = Stream(config, rngs=rngs, dtype=dtype)

    def __call__(
        self,
        img_bnf: jax.Array,
        txt_blf: jax.Array,
        vec_bf: jax.Array,
        rope: Rope,
        attention: JointAttention,
        operations: Operations = BY_XLA,
    ) -> tuple[jax.Array, jax.Array]:
        img_mod, txt_mod = self.img.mod(vec_bf), self.txt.mod(vec_bf)
        txt_qkv = operations.heads(modulated(txt_blf, *txt_mod[:2]), self.txt.qkv, None)
        img_qkv = operations.heads(modulated(img_bnf, *img_mod[:2]), self.img.qkv, rope)
        joint_bmf = merge_heads(
            attention(*(jnp.concatenate(pair, axis=1) for pair in zip(txt_qkv, img_qkv, strict=True)))
        )
        finish = functools.partial(self._finish, joint_bmf, operations)
        return (
            finish(self.img, img_bnf, img_mod, first_row=txt_blf.shape[1]),
            finish(self.txt, txt_blf, txt_mod, first_row=0),
        )

    @staticmethod
    def _finish(
        joint_bmf: jax.Array,
        operations: Operations,
        stream: Stream,
        x_bnf: jax.Array,
        mod: list[jax.Array],
        first_row: int,
    ) -> jax.Array:
        x_bnf = operations.added(x_bnf, mod[2], stream.proj, [joint_bmf], first_row)
        hidden = operations.hidden(modulated(x_bnf, mod[3], mod[4]), stream.mlp_in)
        return operations.added(x_bnf, mod[5], stream.mlp_out, [hidden])


class SingleBlock(nnx.Module):
    """Attention and MLP side by side on the joint sequence, one output projection for both."""

    def __init__(self, config: MMDiTConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        size, kwargs = config.hidden_size, {"rngs": rngs, "dtype": dtype, "param_dtype": dtype}
        self.mod = Modulation(config, 3, rngs=rngs, dtype=dtype)
        self.qkv = QKV(config, bias=True, rngs=rngs, dtype=dtype)
        self.mlp_in = nnx.Linear(size, config.mlp_hidden, **kwargs)
        self.out = nnx.Linear(size + config.mlp_hidden, size, **kwargs)

    def __call__(
        self,
        x_bmf: jax.Array,
        vec_bf: jax.Array,
        rope: Rope,
        attention: JointAttention,
        operations: Operations = BY_XLA,
    ) -> jax.Array:
        shift, scale, gate = self.mod(vec_bf)
        y_bmf = modulated(x_bmf, shift, scale)
        attended_bmf = merge_heads(attention(*operations.heads(y_bmf, self.qkv, rope)))
        hidden = operations.hidden(y_bmf, self.mlp_in, beside=[attended_bmf])
        return operations.added(x_bmf, gate, self.out, [attended_bmf, hidden])


class FinalLayer(nnx.Module):
    """Modulated LayerNorm and a linear map back to the channels of a token."""

    def __init__(self, config: MMDiTConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype):
        self.mod = Modulation(config, 2, rngs=rngs, dtype=dtype)
        self.linear = nnx.Linear(config.hidden_size, config.in_channels, rngs=rngs, dtype=dtype, param_dtype=dtype)

    def __call__(self, x_bnf: jax.Array, vec_bf: jax.Array) -> jax.Array:
        return self.linear(modulated(x_bnf, *self.mod(vec_bf)))


class MMDiT(nnx.Module):
    """Predicts the velocity of packed latent tokens. It sees no mesh: `attention` joins the whole sequence."""

    def __init__(self, config: MMDiTConfig, *, rngs: nnx.Rngs, dtype: jnp.dtype = jnp.float32):
        size, kwargs = config.hidden_size, {"rngs": rngs, "dtype": dtype, "param_dtype": dtype}
        self.config = config
        self.img_in = nnx.Linear(config.in_channels, size, **kwargs)
        self.txt_in = nnx.Linear(config.context_in_dim, size, **kwargs)
        self.time_in = MLPEmbedder(TIME_EMBEDDING_WIDTH, size, rngs=rngs, dtype=dtype)
        self.vector_in = MLPEmbedder(config.vec_in_dim, size, rngs=rngs, dtype=dtype)
        if config.guidance_embed:
            self.guidance_in = MLPEmbedder(TIME_EMBEDDING_WIDTH, size, rngs=rngs, dtype=dtype)
        if config.cond_embed:
            self.cond_in = nnx.Linear(config.cond_channels, size, **kwargs)
        double, single = (functools.partial(make, config, dtype=dtype) for make in (DoubleBlock, SingleBlock))
        self.double_blocks = stack_blocks(double, config.depth, rngs)
        self.single_blocks = stack_blocks(single, config.depth_single_blocks, rngs)
        self.final_layer = FinalLayer(config, rngs=rngs, dtype=dtype)

    def embed(
        self,
        img_bnc: jax.Array,
        txt_blc: jax.Array,
        vec_bp: jax.Array,
        t_b: jax.Array,
        cond_bnc: jax.Array | None = None,
        guidance_b: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """What enters the first block: image stream [B, N, F], text stream [B, L, F], conditioning vector [B, F]."""
        dtype = self.img_in.kernel.dtype
        if self.config.cond_embed != (cond_bnc is not None) or self.config.guidance_embed != (guidance_b is not None):
            raise ValueError("cond_bnc and guidance_b must be given exactly if the model embeds them")
        img_bnf = self.img_in(img_bnc.astype(dtype))
        if cond_bnc is not None:
            img_bnf = img_bnf + self.cond_in(cond_bnc.astype(dtype))
        vec_bf = self.time_in(timestep_embedding(t_b).astype(dtype))
        if guidance_b is not None:
            vec_bf = vec_bf + self.guidance_in(timestep_embedding(guidance_b).astype(dtype))
        vec_bf = vec_bf + self.vector_in(vec_bp.astype(dtype))
        return img_bnf, self.txt_in(txt_blc.astype(dtype)), vec_bf

    def __call__(
        self,
        img_bnc: jax.Array,
        txt_blc: jax.Array,
        vec_bp: jax.Array,
        t_b: jax.Array,
        rope: Rope,
        attention: JointAttention,
        cond_bnc: jax.Array | None = None,
        guidance_b: jax.Array | None = None,
        *,
        remat: Remat = False,
        operations: Operations = BY_XLA,
    ) -> jax.Array:
        """Velocity [B, N, C] of the tokens `img_bnc` [B, N, C] at time `t_b` [B] in [0, 1].

        txt [B, L, context_in_dim], vec [B, vec_in_dim], cond [B, N, C + patch²] (mask first), guidance [B]; `rope` over
        the N image tokens; `attention(q, k, v)` on [B, L + N, H, D] each, text tokens first. `remat` keeps only what
        enters each block for the backward pass, and computes the block again there; a policy may keep more.
        `operations`: how blocks multiply.
        """
        img_bnf, txt_blf, vec_bf = self.embed(img_bnc, txt_blc, vec_bp, t_b, cond_bnc, guidance_b)
        x_bnf = self.blocks(img_bnf, txt_blf, vec_bf, rope, attention, remat=remat, operations=operations)
        return self.final_layer(x_bnf, vec_bf)

    def blocks(
        self,
        img_bnf: jax.Array,
        txt_blf: jax.Array,
        vec_bf: jax.Array,
        rope: Rope,
        attention: JointAttention,
        *,
        remat: Remat = False,
        operations: Operations = BY_XLA,
    ) -> jax.Array:
        """The image stream [B, N, F] behind the last block, of what `embed` gives."""
        kept = functools.partial(_recomputed, remat=remat)

        @kept
        def double(streams: Streams, block: DoubleBlock) -> tuple[Streams, None]:
            return block(*streams, vec_bf, rope, attention, operations), None

        img_bnf, txt_blf = operations.scan(double, (img_bnf, txt_blf), self.double_blocks, vec_bf)
        text_length = txt_blf.shape[1]
        joint_rope = after_text(rope, text_length)

        @kept
        def single(x_bmf: jax.Array, block: SingleBlock) -> tuple[jax.Array, None]:
            return block(x_bmf, vec_bf, joint_rope, attention, operations), None

        x_bmf = operations.scan(single, jnp.concatenate([txt_blf, img_bnf], axis=1), self.single_blocks, vec_bf)
        return x_bmf[:, text_length:]


def merge_heads(x_bmhd: jax.Array) -> jax.Array:
    """[B, M, H, D] → [B, M, H·D]."""
    return x_bmhd.reshape(*x_bmhd.shape[:2], -1)


def _recomputed(block: Callable[..., Any], remat: Remat) -> Callable[..., Any]:
    if not remat:
        return block
    # The two passes are loops of their own, so that the compiler cannot merge what both of them compute.
    return jax.checkpoint(block, prevent_cse=False, policy=None if remat is True else remat)
