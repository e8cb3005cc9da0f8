"""The projections of a model by their names, and copies of it in which some are exchanged.

A name is the projection's nnx path joined with dots, such as `double_blocks.img.qkv.lin`.
"""

from __future__ import annotations

from typing import Any, TypeVar

import jax
from flax import nnx

Module = TypeVar("Module", bound=nnx.Module)
Projection = nnx.Linear | nnx.LinearGeneral


def projections(model: nnx.Module) -> dict[str, Projection]:
    """Every projection of a model, abstract or not, by its name."""
    return {
        ".".join(map(str, path)): module
        for path, module in nnx.iter_modules(model)
        if isinstance(module, nnx.Linear | nnx.LinearGeneral)
    }


def outputs(projection: Projection) -> int:
    """How many axes its outputs have: of its kernel, [(L,) F, O…], the last ones."""
    return len(projection.out_features) if isinstance(projection, nnx.LinearGeneral) else 1


def copied(model: Module) -> Module:
    """A copy that shares the arrays, so that its layers can be exchanged without changing the original."""
    return jax.tree.map(lambda leaf: leaf, model)


def at(model: nnx.Module, name: str) -> Any:
    """The module of that name inside another."""
    for part in name.split("."):
        model = getattr(model, part)
    return model


def put(model: nnx.Module, name: str, module: nnx.Module) -> None:
    """Sets the module of that name, in place."""
    parent, _, last = name.rpartition(".")
    setattr(at(model, parent) if parent else model, last, module)
