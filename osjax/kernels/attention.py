"""The public attention call: an implementation is chosen by name and device, never exchanged in silence.

B batch, N queries, M keys, H heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from osjax.errors import OsjaxError
from osjax.kernels.attention_ref import reference_attention
from osjax.kernels.flash_sm90 import flash_attention

Attention = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
NAMES = ("auto", "xla", "cudnn", "pallas")
HOPPER = "9.0"
FASTER_THAN_CUDNN = (128,)  # head widths; measured, see docs/performance.md


def cudnn_attention(
    q_bnhd: jax.Array, k_bmhd: jax.Array, v_bmhd: jax.Array, *, scale: float | None = None
) -> jax.Array:
    """cuDNN's fused attention: float16 or bfloat16, NVIDIA GPUs from Ampere on; shapes as `reference_attention`."""
    return jax.nn.dot_product_attention(q_bnhd, k_bmhd, v_bmhd, scale=scale, implementation="cudnn")


def choose_attention(
    name: str, device: jax.Device, dtype: jnp.dtype, width: int | None = None, *, gradient: bool = False
) -> tuple[str, Attention]:
    """(chosen name, function) for `name` in `NAMES` on that device; a named one runs or raises.

    `auto` takes, in 16-bit types, the Pallas kernel on Hopper for the head widths where it was measured to be faster
    than cuDNN (`width`, where the caller knows it), else cuDNN on NVIDIA GPUs; everywhere else plain XLA. `gradient`:
    training needs one, which the Pallas kernel has not. Raises OsjaxError for an unknown name, or a named
    implementation that this device or dtype cannot run, or that has no gradient where one is needed.
    """
    half = jnp.dtype(dtype) in (jnp.dtype(jnp.float16), jnp.dtype(jnp.bfloat16))
    fused = device.platform == "gpu" and half
    hopper = fused and getattr(device, "compute_capability", "") == HOPPER
    if name not in NAMES:
        raise OsjaxError(f"unknown attention {name!r}: use one of {', '.join(NAMES)}")
    if name == "cudnn" and not fused:
        raise _cannot_run(name, "an NVIDIA GPU", device, dtype)
    if name == "pallas" and not hopper:
        raise _cannot_run(name, "a Hopper GPU (H100, H200)", device, dtype)
    if name == "pallas" and gradient:
        raise OsjaxError("attention pallas has no gradient: train with --attention auto")
    if name == "pallas" or (name == "auto" and hopper and width in FASTER_THAN_CUDNN and not gradient):
        return "pallas", flash_attention
    if name == "cudnn" or (name == "auto" and fused):
        return "cudnn", cudnn_attention
    return "xla", reference_attention


def _cannot_run(name: str, needs: str, device: jax.Device, dtype: jnp.dtype) -> OsjaxError:
    kind = f"{device.platform} ({device.device_kind}) and {jnp.dtype(dtype).name}"
    return OsjaxError(f"attention {name} needs {needs} and bf16 or fp16, not {kind}: use --attention auto")
