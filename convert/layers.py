"""Rules of the layers that convolutional networks are made of: names of torch's tensors to nnx leaves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from convert.rules import Rule, Write


def convolution(source: str, leaf: str) -> list[Rule]:
    """torch Conv: weight (out, in, *size) -> kernel [*size, in, out]; bias [out].

    A grouped one, too: there and here `in` are the inputs of one group.
    """
    return _layer(source, leaf, "kernel", lambda weight: weight.transpose(*range(2, weight.ndim), 1, 0))


def pointwise(source: str, leaf: str) -> list[Rule]:
    """torch Linear (out, in), or a Conv of size 1 (out, in, 1, ...) -> kernel [in, out]; bias [out]."""
    return _layer(source, leaf, "kernel", lambda weight: weight.reshape(weight.shape[:2]).T)


def norm(source: str, leaf: str) -> list[Rule]:
    """torch GroupNorm or RMSNorm: weight -> scale; bias."""
    return _layer(source, leaf, "scale", lambda weight: weight)


def _layer(source: str, leaf: str, name: str, take: Callable[[Any], Any]) -> list[Rule]:
    return [
        Rule(rf"{source}\.weight", (Write(f"{leaf}.{name}", take),)),
        Rule(rf"{source}\.bias", (Write(f"{leaf}.bias", lambda bias: bias),)),
    ]
