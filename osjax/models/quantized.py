"""8-bit projections of the MMDiT's blocks, in place of their weights: approximate.

`fp8`: weights in float8 e4m3 with a scale for each output channel, activations with one for each token, so that the
products run on 8-bit tensor cores and are summed in float32 (the type: Micikevicius et al. 2022, "FP8 Formats for Deep
Learning"; scales by row and by column: Dettmers et al. 2022, "LLM.int8()", section 3.1). `int8`: the weights alone, for
half the memory on cards without fp8; they are widened where they are used.

What a block is modulated by, the first and the last layers and all embeddings stay as they are: they are small, and all
else depends on them.

L layers of a stacked projection (other projections lack the axis), F input features, O output axes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from osjax.errors import OsjaxError
from osjax.models.projections import Module, Projection, copied, outputs, projections, put

FULL = "full"  # the weights as they are
PRECISIONS = {"fp8": jnp.float8_e4m3fn, "int8": jnp.int8}
NAMES = (FULL, *PRECISIONS)
LEAST_SCALE = float(jnp.finfo(jnp.float32).tiny)  # what is below is 0 to some devices, and no divisor
_FP8_SINCE = (8, 9)  # compute capability: Ada, then Hopper
_BLOCKS = ("double_blocks.", "single_blocks.")
MODULATION = ".mod.lin"  # how the names of projections end that stay as they are


class Rounded(NamedTuple):
    """Numbers of 8 bits [..., F] and what to multiply them by, float32 [...], one for each row of the last axis."""

    values: jax.Array
    scale: jax.Array


class QuantizedLinear(nnx.Module):
    """x·W + b of a projection whose weights have 8 bits: [..., F] → [..., O…], in x's dtype.

    kernel: [O…, F], rows contiguous as fp8 tensor cores want both operands; scale: float32 [O…]; bias: [O…] or None.
    """

    def __init__(self, kernel: Rounded, bias: jax.Array | None):
        self.kernel = nnx.Param(kernel.values)
        self.scale = nnx.Param(kernel.scale)
        self.bias = None if bias is None else nnx.Param(bias)

    @property
    def rounds_inputs(self) -> bool:
        """Whether what it multiplies has 8 bits too."""
        return not jnp.issubdtype(self.kernel.dtype, jnp.integer)

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.kernel[...]
        if self.rounds_inputs:
            return self.of_rounded(rounded(x, kernel.dtype), x.dtype)
        return self._whole(_product(x, kernel.astype(x.dtype)), x.dtype)

    def of_rounded(self, x: Rounded, dtype: jnp.dtype) -> jax.Array:
        """The same for inputs that are rounded already, as the kernel is; the result has that dtype."""
        y = _product(x.values, self.kernel[...])
        return self._whole(y * x.scale.reshape(*x.scale.shape, *(1,) * (y.ndim - x.scale.ndim)), dtype)

    def _whole(self, y: jax.Array, dtype: jnp.dtype) -> jax.Array:
        y = y * self.scale[...]
        if self.bias is not None:
            y = y + self.bias[...].astype(y.dtype)
        return y.astype(dtype)

    def bound(self, x: Rounded) -> jax.Array:
        """What no result of a row exceeds, float32 [...], as no product exceeds the norms of both (Cauchy-Schwarz)."""
        rows = tuple(range(self.kernel.ndim - 1))
        norm = jnp.sqrt(jnp.square(self.kernel[...].astype(jnp.float32)).sum(axis=-1)) * self.scale[...]
        length = math.sqrt(self.kernel.shape[-1]) * _largest(x.values.dtype)
        most = x.scale * (length * norm.max(axis=rows))
        return most if self.bias is None else most + jnp.abs(self.bias[...].astype(jnp.float32)).max()


def rounded(x: jax.Array, dtype: jnp.dtype) -> Rounded:
    """x [..., F] in 8 bits, each row of its last axis scaled so that its largest number is the type's. A row of zeros
    stays one; one that holds what is not finite has a scale or numbers that are not, so that it shows."""
    (values,), scale = rounded_side_by_side([x], dtype)
    return Rounded(values, scale)


def rounded_side_by_side(parts: Sequence[jax.Array | Rounded], dtype: jnp.dtype) -> tuple[list[jax.Array], jax.Array]:
    """`rounded` of the parts [..., F1], [..., F2], … as if their rows were joined: (values of each, their scale). If
    the last is rounded, its scale is that of all."""
    *others, last = parts
    if isinstance(last, Rounded):
        return [*(rounded_by(x, last.scale, dtype) for x in others), last.values], last.scale
    scale = scale_of(peaks(parts), dtype)
    return [rounded_by(x, scale, dtype) for x in parts], scale


def peaks(parts: Sequence[jax.Array]) -> jax.Array:
    """The largest magnitudes of rows [..., F1], [..., F2], … that are joined: float32 [...]."""
    return functools.reduce(jnp.maximum, [jnp.abs(x.astype(jnp.float32)).max(axis=-1) for x in parts])


def rounded_by(x: jax.Array, scale: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """x [..., F] in 8 bits by the scale [...] of its rows; what exceeds the type's largest number ends there."""
    whole, largest = jnp.issubdtype(dtype, jnp.integer), _largest(dtype)
    scaled = x.astype(jnp.float32) * (1.0 / scale)[..., None]  # a division each would take longer than to read them
    # What is rounded up beyond the largest number would be not a number in e4m3.
    return jnp.clip(jnp.round(scaled) if whole else scaled, -largest, largest).astype(dtype)


def scale_of(peak: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """The scale of rows in 8 bits whose largest magnitude that is."""
    return jnp.maximum(peak / _largest(dtype), LEAST_SCALE)


def _largest(dtype: jnp.dtype) -> float:
    return float(jnp.iinfo(dtype).max if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo(dtype).max)


def checked(precision: str, device: jax.Device) -> str:
    """The precision, if it is one of NAMES that the device computes in; CPUs do in all, slowly. Raises OsjaxError."""
    if precision not in NAMES:
        raise OsjaxError(f"unknown precision {precision!r}: use one of {', '.join(NAMES)}")
    capability = str(getattr(device, "compute_capability", ""))
    if precision == "fp8" and capability and tuple(map(int, capability.split("."))) < _FP8_SINCE:
        raise OsjaxError(f"fp8 needs a GPU of compute capability 8.9 or newer, not {capability}: use --precision int8")
    return precision


def quantize(model: Module, precision: str) -> Module:
    """A copy of an MMDiT (also under `nnx.eval_shape`) with the projections of its blocks in 8 bits; the same model for
    FULL. precision: of NAMES (`checked`)."""
    if precision == FULL:
        return model
    small = copied(model)
    for name in quantizable(model):
        put(small, name, _quantized(projections(model)[name], precision))
    return small


def rounded_kernel(kernel: jax.Array, outputs: int, precision: str) -> Rounded:
    """A projection's kernel [(L,) F, O…], of so many output axes, as [(L,) O…, F] in 8 bits and scales [(L,) O…]."""
    return rounded(jnp.moveaxis(kernel, -outputs - 1, -1), PRECISIONS[precision])


def quantizable(model: nnx.Module) -> tuple[str, ...]:
    """Names of the projections that `quantize` exchanges; none of a model whose blocks are in 8 bits already."""
    return tuple(
        name for name in projections(model) if name.startswith(_BLOCKS) and not f".{name}".endswith(MODULATION)
    )


def _quantized(projection: Projection, precision: str) -> QuantizedLinear:
    kernel = rounded_kernel(projection.kernel[...], outputs(projection), precision)
    return QuantizedLinear(kernel, None if projection.bias is None else projection.bias[...])


def _product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """[..., F] with [O…, F] → float32 [..., O…]."""
    dims = (((x.ndim - 1,), (kernel.ndim - 1,)), ((), ()))
    return jax.lax.dot_general(x, kernel, dims, preferred_element_type=jnp.float32)
