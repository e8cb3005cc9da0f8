"""Conversion is data: rules, a plan that matches both sides completely, and its execution in memory.

A rule names source tensors by a regular expression (full match) and says which leaves of the Flax module they fill.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Write:
    """One use of a source tensor.

    leaf: name of the target leaf (nnx path joined with dots); `{name}` and `{0}` fields are the regex's groups.
    take: tensor -> array of the slot's shape; array methods and indexing only, so that it runs under `eval_shape` too.
    slot: index into the leaf (of one layer, if the leaf is stacked over layers); () is the whole of it.
    """

    leaf: str
    take: Callable[[Any], Any]
    slot: tuple[Any, ...] = ()


@dataclasses.dataclass(frozen=True)
class Rule:
    """source: regex, full match; a group named `layer` is the row of a stacked leaf. No writes: known and unused."""

    source: str
    writes: tuple[Write, ...] = ()
