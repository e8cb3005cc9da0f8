"""The public attention call: an implementation is chosen by name and device, never exchanged in silence.

B batch, N queries, M keys, H heads, D head width.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from osjax.errors import OsjaxError
from osjax.kernels.attention_ref import reference_attention
from osjax.kernels.flash_fp8_sm90 import WIDTH, flash_attention_fp8
from osjax.kernels.flash_sm90 import MEASURED_BEST, flash_attention

Attention = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]
KERNELS = ("pallas", "cudnn", "xla")  # from the fastest to the one that runs everywhere
APPROXIMATE = ("fp8",)  # only where they are named
NAMES = ("auto", *reversed(KERNELS), *APPROXIMATE)
HEAD_WIDTHS = {"pallas": tuple(MEASURED_BEST), "fp8": (WIDTH,)}  # of kernels for Hopper GPUs
HOPPER = "9.0"
FASTER_THAN_CUDNN = (128,)  # head widths; measured, see docs/performance.md


def cudnn_attention(
    q_bnhd: jax.Array, k_bmhd: jax.Array, v_bmhd: jax.Array, *, scale: float | None = None
) -> jax.Array:
    """cuDNN's fused attention: float16 or bfloat16, NVIDIA GPUs from Ampere on; shapes as `reference_attention`."""
    return jax.nn.dot_product_attention(q_bnhd, k_bmhd, v_bmhd, scale=scale, implementation="cudnn")


def why_not(
    name: str, device: jax.Device, dtype: jnp.dtype, width: int | None = None, *, gradient: bool = False
) -> str | None:
    """Why the kernel `name`, of `KERNELS` or `APPROXIMATE`, cannot run on that device in that dtype; None if it can.

    width: of a head, where the caller knows it; gradient: whether one is needed.
    """
    half = jnp.dtype(dtype) in (jnp.dtype(jnp.float16), jnp.dtype(jnp.bfloat16))
    fused = device.platform == "gpu" and half
    here = f"not {device.platform} ({device.device_kind}) and {jnp.dtype(dtype).name}"
    if name == "cudnn" and not fused:
        return f"needs an NVIDIA GPU and bf16 or fp16, {here}"
    if name in HEAD_WIDTHS and not (fused and getattr(device, "compute_capability", "") == HOPPER):
        return f"needs a Hopper GPU (H100, H200) and bf16 or fp16, {here}"
    if name in HEAD_WIDTHS and width is not None and width not in HEAD_WIDTHS[name]:
        return f"knows heads of width {' and '.join(map(str, HEAD_WIDTHS[name]))}, not {width}"
    if name in HEAD_WIDTHS and gradient:
        return "has no gradient"
    return None


def choose_attention(
    name: str, device: jax.Device, dtype: jnp.dtype, width: int | None = None, *, gradient: bool = False
) -> tuple[str, Attention]:
    """(chosen name, function) for `name` in `NAMES` on that device; a named one runs or raises.

    `auto` takes the first of `KERNELS` that can run, but Pallas only for the head widths where it was measured to be
    faster than cuDNN (`width`, where the caller knows it). Raises OsjaxError for an unknown name, or for a named kernel
    that cannot run, saying why.
    """
    if name not in NAMES:
        raise OsjaxError(f"unknown attention {name!r}: use one of {', '.join(NAMES)}")
    reasons = {kernel: why_not(kernel, device, dtype, width, gradient=gradient) for kernel in (*KERNELS, *APPROXIMATE)}
    if reasons.get(name):
        instead = "train with" if gradient else "use"
        raise OsjaxError(f"attention {name} {reasons[name]}: {instead} --attention auto")
    if name == "auto":
        able = [kernel for kernel in KERNELS if reasons[kernel] is None]
        name = next(kernel for kernel in able if kernel != "pallas" or width in FASTER_THAN_CUDNN)
    functions = {"pallas": flash_attention, "cudnn": cudnn_attention, "xla": reference_attention}
    functions["fp8"] = flash_attention_fp8
    return name, functions[name]
