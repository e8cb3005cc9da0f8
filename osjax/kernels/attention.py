"""The public attention call: an implementation is chosen by name and device, never exchanged in silence.

B batch, N queries, M keys, H heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from osjax.errors import OsjaxError
from osjax.kernels.attention_ref import reference_attention

Attention = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
NAMES = ("auto", "xla", "cudnn")


def cudnn_attention(
    q_bnhd: jax.Array, k_bmhd: jax.Array, v_bmhd: jax.Array, *, scale: float | None = None
) -> jax.Array:
    """cuDNN's fused attention: float16 or bfloat16, NVIDIA GPUs from Ampere on; shapes as `reference_attention`."""
    return jax.nn.dot_product_attention(q_bnhd, k_bmhd, v_bmhd, scale=scale, implementation="cudnn")


def choose_attention(name: str, device: jax.Device, dtype: jnp.dtype) -> tuple[str, Attention]:
    """(chosen name, function) for `name` in `NAMES` on that device; a named one runs or raises.

    `auto` takes cuDNN on NVIDIA GPUs in 16-bit types, else plain XLA. Raises OsjaxError for an unknown name, or a named
    implementation that this device or dtype cannot run.
    """
    half = jnp.dtype(dtype) in (jnp.dtype(jnp.float16), jnp.dtype(jnp.bfloat16))
    fused = device.platform == "gpu" and half
    if name not in NAMES:
        raise OsjaxError(f"unknown attention {name!r}: use one of {', '.join(NAMES)}")
    if name == "cudnn" and not fused:
        raise OsjaxError(
            f"attention cudnn needs an NVIDIA GPU and bf16 or fp16, not {device.platform} and {jnp.dtype(dtype).name}: "
            "use --attention auto"
        )
    if name == "cudnn" or (name == "auto" and fused):
        return "cudnn", cudnn_attention
    return "xla", reference_attention
