"""Names of a module's leaves: the nnx path joined with dots, `double_blocks.img.qkv.lin.kernel`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from flax import nnx

Module = TypeVar("Module", bound=nnx.Module)


def flatten(module: nnx.Module) -> dict[str, Any]:
    """Leaf name → array (`jax.ShapeDtypeStruct` for a module made by `nnx.eval_shape`)."""
    _, state = nnx.split(module)
    return {_name(path): variable.get_value() for path, variable in nnx.to_flat_state(state)}


def unflatten(module: Module, arrays: Mapping[str, Any]) -> Module:
    """A copy of `module` (abstract or not) that holds `arrays`, which must name every leaf of it and nothing else."""
    graph, state = nnx.split(module)
    flat = nnx.to_flat_state(state)
    filled = [(path, variable.replace(arrays[_name(path)])) for path, variable in flat]
    if len(filled) != len(arrays):
        raise KeyError(f"arrays without a leaf: {sorted(set(arrays) - {_name(path) for path, _ in filled})}")
    return nnx.merge(graph, nnx.from_flat_state(filled))


def _name(path: tuple[Any, ...]) -> str:
    return ".".join(map(str, path))
