"""Pieces of 3D convolutional networks over videos [B, T, H, W, C]: causal convolution, norm, upsampling."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

Factors = tuple[int, int, int]  # of time, height, width


class CausalConv3D(nnx.Conv):
    """A cubic convolution that sees no later frame.

    The border repeats: k // 2 on each side of height and width, k - 1 in front of time. A length n becomes
    ceil(n / stride) for odd k, so 1 + 4·n frames halve twice to 1 + n.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        size: int = 3,
        stride: Factors = (1, 1, 1),
        *,
        rngs: nnx.Rngs,
        dtype: jnp.dtype = jnp.float32,
    ):
        super().__init__(
            c_in, c_out, (size,) * 3, strides=stride, padding="VALID", dtype=dtype, param_dtype=dtype, rngs=rngs
        )

    def __call__(self, x_bthwc: jax.Array) -> jax.Array:
        size = self.kernel_size[0]
        side = (size // 2, size // 2)
        if x_bthwc.shape[1] == 1:
            return self._picture(jnp.pad(x_bthwc[:, 0], ((0, 0), side, side, (0, 0)), mode="edge"))[:, None]
        return super().__call__(jnp.pad(x_bthwc, ((0, 0), (size - 1, 0), side, side, (0, 0)), mode="edge"))

    def _picture(self, x_bhwc: jax.Array) -> jax.Array:
        """Of a single frame, which all taps in time see: their sum does in one pass what they do in three."""
        kernel_hwio = self.kernel.sum(axis=0, dtype=jnp.float32).astype(self.dtype)
        y_bhwc = jax.lax.conv_general_dilated(
            x_bhwc.astype(self.dtype),
            kernel_hwio,
            window_strides=self.strides[1:],
            padding="VALID",
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        return y_bhwc + self.bias


def group_norm(channels: int, groups: int, *, rngs: nnx.Rngs, dtype: jnp.dtype) -> nnx.GroupNorm:
    """GroupNorm over (T, H, W, C / groups), eps 1e-6, computed in float32 whatever the dtype, in two passes."""
    return nnx.GroupNorm(
        channels, groups, epsilon=1e-6, use_fast_variance=False, dtype=dtype, param_dtype=dtype, rngs=rngs
    )


def upsample_nearest_causal(x_bthwc: jax.Array, factors: Factors) -> jax.Array:
    """Repeat every element by the factors of (time, height, width), but the first frame only in height and width.

    T frames become 1 + (T - 1)·factor: the inverse of what strided causal convolutions do to the length.
    """
    time, height, width = factors
    x_bthwc = jnp.repeat(jnp.repeat(x_bthwc, height, axis=2), width, axis=3)
    return jnp.repeat(x_bthwc, time, axis=1)[:, time - 1 :]
