"""3D convolutions of padded inputs: by XLA everywhere, by a kernel on Hopper GPUs.

B batch, T frames, H height, W width, C input channels, O output channels; kd, kh, kw sizes of the kernel.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from osjax.kernels.attention import HOPPER
from osjax.kernels.conv_sm90 import conv3d

# (x [B, T + kd - 1, H + kh - 1, W + kw - 1, C], kernel [kd, kh, kw, C, O], bias [O], residual [B, T, H, W, O] or None)
# → x convolved with the kernel, plus bias, plus residual, [B, T, H, W, O]
Convolution = Callable[[jax.Array, jax.Array, jax.Array, jax.Array | None], jax.Array]

hopper_convolution: Convolution = jax.jit(conv3d)  # jitted, so that equal ones of a network are lowered once


def xla_convolution(
    x_bthwc: jax.Array,
    kernel_dhwio: jax.Array,
    bias_o: jax.Array,
    residual_bthwo: jax.Array | None = None,
    *,
    strides: tuple[int, int, int] = (1, 1, 1),
) -> jax.Array:
    """A `Convolution` for every device and dtype, with a gradient; strided, if that is wanted."""
    if x_bthwc.shape[1] == kernel_dhwio.shape[0] == 1:  # libraries are better at pictures
        y_bhwo = _convolve(x_bthwc[:, 0], kernel_dhwio[0], strides[1:], ("NHWC", "HWIO", "NHWC"))
        y_bthwo = y_bhwo[:, None]
    else:
        y_bthwo = _convolve(x_bthwc, kernel_dhwio, strides, ("NDHWC", "DHWIO", "NDHWC"))
    y_bthwo = y_bthwo + bias_o
    return y_bthwo if residual_bthwo is None else y_bthwo + residual_bthwo


def choose_convolution(device: jax.Device, dtype: jnp.dtype) -> Convolution:
    """The fastest `Convolution` of stride 1 on one such device; only XLA's has a gradient, or is partitioned."""
    half = jnp.dtype(dtype) in (jnp.dtype(jnp.float16), jnp.dtype(jnp.bfloat16))
    hopper = device.platform == "gpu" and getattr(device, "compute_capability", "") == HOPPER
    return hopper_convolution if half and hopper else xla_convolution


def _convolve(x: jax.Array, kernel: jax.Array, strides: tuple[int, ...], dims: tuple[str, str, str]) -> jax.Array:
    return jax.lax.conv_general_dilated(x, kernel, strides, "VALID", dimension_numbers=dims)
