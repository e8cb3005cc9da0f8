"""What a function computes and moves at least, read off its trace, and how fast a device could do it.

Matrix products and convolutions are counted, nothing else: they alone come near a device's rate. The trace is that of
plain JAX, because what a kernel of our own computes is not in it; such a kernel is an error here, and not a zero.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from osjax.liveness import bodies

_OPAQUE = frozenset({"pallas_call", "core_map", "pure_callback", "io_callback", "ffi_call", "custom_call"})


@dataclasses.dataclass(frozen=True)
class Work:
    """operations: additions and multiplications of products and convolutions; bytes: of all arrays that are read, such
    as weights, and of all results, each once."""

    operations: int
    bytes: int


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What a device does at most: operations a second, and bytes that it reads or writes a second."""

    operations: float
    bytes: float


@dataclasses.dataclass(frozen=True)
class Floor:
    """The least seconds, and which of the two ceilings, operations or bytes, they are due to."""

    seconds: float
    bound: str


def floor(work: Work, ceilings: Ceilings) -> Floor:
    """How long the work takes where nothing but the ceilings holds it up, and both of its parts overlap."""
    times = {name: getattr(work, name) / getattr(ceilings, name) for name in ("operations", "bytes")}
    bound = max(times, key=times.__getitem__)
    return Floor(times[bound], bound)


def work_of(function: Callable[..., Any], *arguments: Any) -> Work:
    """The work of `function` for arguments that are pytrees of arrays or `jax.ShapeDtypeStruct`. Arrays among them that
    it does not read are not counted.

    Raises ValueError for what cannot be counted: a kernel, or a loop of unknown length that computes products.
    """
    jaxpr = jax.make_jaxpr(function)(*arguments).jaxpr
    read = {id(atom) for equation in jaxpr.eqns for atom in equation.invars} | {id(atom) for atom in jaxpr.outvars}
    given = [variable for variable in (*jaxpr.invars, *jaxpr.constvars) if id(variable) in read]
    return Work(_operations(jaxpr), sum(_bytes(variable) for variable in (*given, *jaxpr.outvars)))


@functools.lru_cache(maxsize=256)  # a tile's network is traced once and called for each tile
def _operations(jaxpr: Any) -> int:
    return sum(map(_equation_operations, jaxpr.eqns))


def _equation_operations(equation: Any) -> int:
    name = equation.primitive.name
    if name == "dot_general":
        (contracted, _), _ = equation.params["dimension_numbers"]
        left = equation.invars[0].aval.shape
        return 2 * _size(equation.outvars[0]) * math.prod(left[dim] for dim in contracted)
    if name == "conv_general_dilated":
        kernel, layout = equation.invars[1].aval.shape, equation.params["dimension_numbers"].rhs_spec
        return 2 * _size(equation.outvars[0]) * math.prod(kernel[dim] for dim in layout[1:])  # [0]: output channels
    if name in _OPAQUE:
        raise ValueError(f"what {name} computes is not in the trace: trace plain JAX in its place")
    inside = [_operations(body) for body in bodies(equation)]
    if name == "while" and any(inside):
        raise ValueError("a loop of unknown length computes products: trace one whose length is known")
    if name == "cond":
        return max(inside)
    return sum(inside) * (equation.params["length"] if name == "scan" else 1)


def _size(variable: Any) -> int:
    return math.prod(variable.aval.shape)


def _bytes(variable: Any) -> int:
    return _size(variable) * np.dtype(variable.aval.dtype).itemsize
