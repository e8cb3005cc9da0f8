"""Conversion is data: rules, a plan that matches both sides completely, and its execution in memory.

A rule names source tensors by a regular expression (full match) and says which leaves of the Flax module they fill. A
leaf is filled in slabs: a stacked leaf layer by layer, any other leaf at once. Nothing needs more than one in memory.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from flax import nnx

from osjax import leaves
from osjax.errors import OsjaxError


@dataclasses.dataclass(frozen=True)
class Write:
    """One use of a source tensor.

    leaf: name of the target leaf (nnx path joined with dots); `{name}` and `{0}` fields are the regex's groups.
    take: tensor -> array of the slot's shape; array methods and indexing only, so that it runs under `eval_shape` too.
    slot: index into the leaf (of one layer, if the leaf is stacked over layers); () is the whole of it.
    """

    leaf: str
    take: Callable[[Any], Any]
    slot: tuple[int | slice, ...] = ()


@dataclasses.dataclass(frozen=True)
class Rule:
    """source: regex, full match; a group named `layer` is the row of a stacked leaf. No writes: known and unused.

    The first rule that matches a tensor decides. alias: a second name of a tensor that a file may hold under either or
    both: it is used only if no other tensor fills its place, else it counts as known and unused.
    """

    source: str
    writes: tuple[Write, ...] = ()
    alias: bool = False


@dataclasses.dataclass(frozen=True)
class Fill:
    """`slab[slot] = take(tensor)` for one source tensor."""

    source: str
    take: Callable[[Any], Any]
    slot: tuple[int | slice, ...]


@dataclasses.dataclass(frozen=True)
class Slab:
    """A whole leaf, or one layer (row) of a stacked leaf, and all that fills it."""

    leaf: str
    layer: int | None
    shape: tuple[int, ...]
    dtype: np.dtype
    fills: tuple[Fill, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def assemble(self, read: Callable[[str], np.ndarray]) -> np.ndarray:
        """The slab's values, cast to its dtype. `read` gives a source tensor by name."""
        array = np.empty(self.shape, self.dtype)
        for fill in self.fills:
            array[fill.slot] = fill.take(read(fill.source))
        return array


@dataclasses.dataclass(frozen=True)
class Plan:
    """A complete match: the slabs that fill every leaf once, layer by layer, and the source tensors nothing needs."""

    slabs: tuple[Slab, ...]
    unused: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        return sum(slab.nbytes for slab in self.slabs)


class Table(Protocol):
    """What a module `convert/<model>.py` exposes."""

    def read_config(self, options: dict[str, Any]) -> Any: ...
    def rules(self, config: Any) -> list[Rule]: ...
    def build(self, config: Any, dtype: Any) -> nnx.Module: ...


def plan(
    rules: Sequence[Rule],
    source_shapes: Mapping[str, jax.ShapeDtypeStruct],
    targets: Mapping[str, jax.ShapeDtypeStruct],
) -> Plan:
    """Matches source tensors with target leaves so that every tensor is known and every leaf is filled exactly once.

    Raises one OsjaxError that lists all tensors and leaves that are left over, clash or do not fit.
    """
    claims, unknown, unused = _claims(rules, source_shapes, targets)
    problems = {"unknown tensors": unknown, "leaves not filled": [], "filled twice": [], "wrong shapes": []}
    shape_of = _ShapeOf(source_shapes)
    stacked = {leaf for leaf, layer in claims if layer is not None}
    slabs = []
    for leaf, target in targets.items():
        if leaf in stacked and (leaf, None) in claims:
            problems["filled twice"].append(f"{leaf} (whole and by layers)")
        shape = tuple(target.shape[1:] if leaf in stacked else target.shape)
        for row in range(target.shape[0]) if leaf in stacked else [None]:
            fills = tuple(claims.get((leaf, row), ()))
            slab = Slab(leaf, row, shape, np.dtype(target.dtype), fills)
            _check(slab, shape_of, problems)
            slabs.append(slab)
    if any(problems.values()):
        listed = "; ".join(f"{what}: {', '.join(found)}" for what, found in problems.items() if found)
        raise OsjaxError(f"checkpoint and model do not match ({listed}): check that file and config go together")
    order = {name: position for position, name in enumerate(source_shapes)}
    slabs.sort(key=lambda slab: (-1 if slab.layer is None else slab.layer, order[slab.fills[0].source]))
    return Plan(tuple(slabs), tuple(unused))


def abstract(table: Table, config: Any, dtype: Any) -> nnx.Module:
    """The table's module with `jax.ShapeDtypeStruct` leaves; allocates nothing."""
    return nnx.eval_shape(lambda: table.build(config, dtype))


def convert_module(
    table: Table, options: Mapping[str, Any], tensors: Mapping[str, np.ndarray], dtype: Any
) -> nnx.Module:
    """Converts a checkpoint held in memory (original names → arrays, upstream's constructor options) to a module."""
    config = table.read_config(dict(options))
    module = abstract(table, config, dtype)
    shapes = {name: jax.ShapeDtypeStruct(tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
    targets = leaves.flatten(module)
    arrays = {name: np.empty(target.shape, target.dtype) for name, target in targets.items()}
    for slab in plan(table.rules(config), shapes, targets).slabs:
        arrays[slab.leaf][... if slab.layer is None else slab.layer] = slab.assemble(tensors.__getitem__)
    return leaves.unflatten(module, {name: jax.numpy.asarray(array) for name, array in arrays.items()})


Place = tuple[str, int | None]  # a leaf, and which layer of it if it is filled layer by layer
Claims = dict[Place, list[Fill]]


def find(rules: Iterable[Rule], source: str) -> tuple[Rule, list[Place]] | None:
    """The first rule that matches a tensor's name, and the place that each of its writes fills; None if none does."""
    for rule in rules:
        if match := re.fullmatch(rule.source, source):
            groups = match.groupdict()
            layer = int(groups["layer"]) if "layer" in groups else None
            return rule, [(write.leaf.format(*match.groups(), **groups), layer) for write in rule.writes]
    return None


def exists(place: Place, targets: Mapping[str, jax.ShapeDtypeStruct]) -> bool:
    """Whether the model has that leaf and, if it is a stack, that layer."""
    leaf, layer = place
    return leaf in targets and (layer is None or (targets[leaf].ndim > 0 and layer < targets[leaf].shape[0]))


def _claims(
    rules: Sequence[Rule], sources: Iterable[str], targets: Mapping[str, jax.ShapeDtypeStruct]
) -> tuple[Claims, list[str], list[str]]:
    """(leaf, layer) → fills; tensors that no rule or no place in the model knows; tensors known and unused."""
    matches = {name: find(rules, name) for name in sources}
    unknown = [name for name, found in matches.items() if found is None]
    known = [(name, *found) for name, found in matches.items() if found is not None]
    claims: Claims = {}
    unused = []
    for name, rule, places in sorted(known, key=lambda found: found[1].alias):
        if not places or (rule.alias and any(place in claims for place in places)):
            unused.append(name)
        elif not all(exists(place, targets) for place in places):
            unknown.append(name)
        else:
            for place, write in zip(places, rule.writes, strict=True):
                claims.setdefault(place, []).append(Fill(name, write.take, write.slot))
    return claims, unknown, unused


def _check(slab: Slab, shape_of: _ShapeOf, problems: dict[str, list[str]]) -> None:
    """Adds to `problems` unless the slab's fills have their slots' shapes, do not overlap and leave nothing out."""
    name = slab.leaf if slab.layer is None else f"{slab.leaf}[{slab.layer}]"
    for fill in slab.fills:
        wanted = _empty(slab.shape)[fill.slot].shape
        given = shape_of(fill)
        if given != wanted:
            problems["wrong shapes"].append(f"{fill.source} gives {given}, {name} takes {wanted}")
    boxes = [_box(fill.slot, slab.shape) for fill in slab.fills]
    for (first, box), (second, other) in itertools.combinations(zip(slab.fills, boxes, strict=True), 2):
        if all(max(a.start, b.start) < min(a.stop, b.stop) for a, b in zip(box, other, strict=True)):
            problems["filled twice"].append(f"{name} (by {first.source} and {second.source})")
    if sum(math.prod(map(len, box)) for box in boxes) < math.prod(slab.shape):
        problems["leaves not filled"].append(name if not boxes else f"{name} (in part)")


def _box(slot: tuple[int | slice, ...], shape: tuple[int, ...]) -> tuple[range, ...]:
    """The rows that a slot covers on every axis."""
    axes = [range(size) for size in shape]
    for axis, index in enumerate(slot):
        rows = axes[axis]
        axes[axis] = rows[index] if isinstance(index, slice) else rows[index:][:1]
        if axes[axis].step != 1:
            raise ValueError(f"slot {slot} has a step")
    return tuple(axes)


def _empty(shape: tuple[int, ...]) -> np.ndarray:
    """An array of any shape that takes no memory."""
    return np.broadcast_to(np.int8(0), shape)


class _ShapeOf:
    """Shape of `fill.take(tensor)`, or why there is none; layers share their Write, so each is traced once."""

    def __init__(self, sources: Mapping[str, jax.ShapeDtypeStruct]):
        self._sources = sources
        self._known: dict[tuple[Any, ...], Any] = {}

    def __call__(self, fill: Fill) -> tuple[int, ...] | str:
        source = self._sources[fill.source]
        key = (fill.take, tuple(source.shape))
        if key not in self._known:
            try:
                self._known[key] = jax.eval_shape(fill.take, source).shape
            except (TypeError, ValueError, IndexError) as error:
                self._known[key] = f"nothing from {key[1]} ({str(error).splitlines()[0]})"
        return self._known[key]
