"""Weights changed as they are read: LoRAs merged into them, then their projections rounded to 8 bits.

Leaf by leaf, and of a stack some layers at a time, so that a model in 8 bits never takes the memory of one in full. The
bits are those that `lora.merge` and `quantize` make of the whole model.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
from flax import nnx

from osjax.models.lora import Factors, LoRA, merged
from osjax.models.projections import outputs, projections
from osjax.models.quantized import FULL, Rounded, quantizable, rounded_kernel


@dataclasses.dataclass(frozen=True)
class Changes:
    """lora: what is merged; outputs: how many output axes each projection has that is rounded, to `precision`."""

    lora: LoRA | None
    precision: str
    outputs: Mapping[str, int]

    @classmethod
    def of(cls, model: nnx.Module, lora: LoRA | None, precision: str) -> Changes:
        """For the weights of a model as they are stored; it may be abstract, and in 8 bits already."""
        known, names = projections(model), quantizable(model) if precision != FULL else ()
        return cls(lora, precision, {name: outputs(known[name]) for name in names})

    def __call__(self, leaf: str, array: Any, first: int | None) -> dict[str, Any]:
        """What becomes of a leaf, or of its layers from `first` on; arrays by the names of their leaves."""
        projection, _, parameter = leaf.rpartition(".")
        if parameter != "kernel":
            return {leaf: array}
        factors = self.lora.factors.get(projection) if self.lora else None
        if factors is not None:
            rows = slice(None) if first is None else slice(first, first + len(array))
            array = _merged(array, Factors(*(each[rows] for each in factors)), self.lora.scale)
        if projection not in self.outputs:
            return {leaf: array}
        kernel, scale = _rounded(array, self.outputs[projection], self.precision)
        return {leaf: kernel, f"{projection}.scale": scale}


@functools.partial(jax.jit, static_argnums=2)
def _merged(kernel: jax.Array, factors: Factors, scale: float) -> jax.Array:
    return merged(kernel, factors, scale)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _rounded(kernel: jax.Array, outputs: int, precision: str) -> Rounded:
    return rounded_kernel(kernel, outputs, precision)
