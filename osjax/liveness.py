"""How much memory a function needs at once, read off its trace: nothing is compiled and nothing allocated.

The operations are taken in the order in which they were written, each array from where it is made to where it is last
read. Of what a compiler does only the surest is foreseen: an elementwise operation with a single reader that is
elementwise too, a border or a sum, makes no array of its own, nor does a change of type or shape or a part taken out on
the way to such readers; a part of an array that nothing else will read is exchanged in place. Left out are better
orders, larger fusions and other arrays that are overwritten in place on one side, and on the other what a library's
convolutions and matrix products use for themselves: `osjax/preflight.py` says how far it is from what was measured.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_VIEWS = frozenset({"reshape", "squeeze", "expand_dims", "copy", "stop_gradient", "sharding_constraint"})
_CHEAP = frozenset({"convert_element_type", "broadcast_in_dim", "iota", "slice"}) | _VIEWS
_ELEMENTWISE = _CHEAP | {
    *("add", "sub", "mul", "div", "rem", "neg", "sign", "abs", "max", "min", "pow", "integer_pow", "sqrt", "rsqrt"),
    *("square", "exp", "exp2", "log", "log1p", "expm1", "tanh", "logistic", "erf", "erfc", "sin", "cos", "floor"),
    *("select_n", "clamp", "eq", "ne", "lt", "le", "gt", "ge", "and", "or", "not", "is_finite", "round"),
}
_REDUCTIONS = frozenset({"reduce_sum", "reduce_max", "reduce_min", "reduce_and", "reduce_or", "argmax"})
_FUSED = _ELEMENTWISE | _REDUCTIONS | {"pad"}  # with what they read
_CALLS = frozenset({"jit", "pjit", "closed_call", "core_call", "custom_jvp_call", "custom_vjp_call", "checkpoint"})


@dataclasses.dataclass(frozen=True)
class _Operation:
    """name; what it reads and makes, by number; bytes of each that it makes; inside: the peak of a loop's body."""

    name: str
    reads: tuple[int, ...]
    makes: tuple[int, ...]
    sizes: tuple[int, ...]
    inside: int = 0


def peak_bytes(function: Callable[..., Any], *arguments: Any) -> int:
    """The most bytes that live at once among all that `function` makes, its results included, its arguments not.

    arguments: pytrees of arrays or `jax.ShapeDtypeStruct`. Inside a `shard_map` it is what one device holds; outside of
    it arrays count whole.
    """
    return _peak(jax.make_jaxpr(function)(*arguments).jaxpr)


def tree_bytes(tree: Any) -> int:
    """Of all arrays of a pytree, abstract or not, whole."""
    return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


@functools.lru_cache(maxsize=256)  # a tile's network is traced once and called for each tile
def _peak(jaxpr: Any) -> int:
    numbers: dict[Any, int] = {}
    operations = list(_operations(jaxpr, numbers, itertools.count()))
    given = {numbers[variable] for variable in (*jaxpr.invars, *jaxpr.constvars)}
    results = [numbers[atom] for atom in jaxpr.outvars if _is_variable(atom)]
    return _most_alive(operations, given, results)


def _operations(jaxpr: Any, numbers: dict[Any, int], fresh: Iterator[int]) -> Iterator[_Operation]:
    """Those of a trace, calls written out. numbers: of its variables, filled here."""
    for variable in (*jaxpr.invars, *jaxpr.constvars):
        if variable not in numbers:
            numbers[variable] = next(fresh)
    for equation in jaxpr.eqns:
        name = equation.primitive.name
        reads = tuple(numbers[atom] for atom in equation.invars if _is_variable(atom))
        called = bodies(equation)
        if name == "optimization_barrier":
            for outer, atom in _pairs(equation.outvars, equation.invars):
                numbers[outer] = numbers[atom] if _is_variable(atom) else next(fresh)
            continue
        if name in _CALLS and len(called) == 1 and len(called[0].invars) == len(equation.invars):
            yield from _written_out(equation, called[0], numbers, fresh)
            continue
        makes = tuple(next(fresh) for _ in equation.outvars)
        numbers.update(zip(equation.outvars, makes, strict=True))
        sizes = tuple(_bytes(variable) for variable in equation.outvars)
        inside = (
            max((_peak(body) + _entering(equation, body) for body in called), default=0) if name != "pallas_call" else 0
        )
        yield _Operation(name, reads, makes, sizes, inside)


def _written_out(equation: Any, body: Any, numbers: dict[Any, int], fresh: Iterator[int]) -> Iterator[_Operation]:
    inner: dict[Any, int] = {}
    for variable, atom in zip(body.invars, equation.invars, strict=True):
        inner[variable] = numbers[atom] if _is_variable(atom) else next(fresh)
    yield from _operations(body, inner, fresh)
    for outer, result in zip(equation.outvars, body.outvars, strict=True):
        numbers[outer] = inner[result] if _is_variable(result) else next(fresh)


def _entering(equation: Any, body: Any) -> int:
    """What a loop makes of its operands before its body runs: this turn's slices, and what is handed on to it."""
    if equation.primitive.name == "scan":
        # Carried arrays have the same shape inside, slices a dimension less; the constants before them are not copied.
        carried = sum(_shape(outer) == _shape(inner) for outer, inner in _pairs(equation.outvars, body.outvars))
        sliced = sum(_shape(outer) != _shape(inner) for outer, inner in _pairs(equation.invars, body.invars))
        return sum(map(_bytes, body.invars[len(body.invars) - carried - sliced :]))
    if equation.primitive.name == "while":
        return sum(map(_bytes, body.outvars))
    return 0


def bodies(equation: Any) -> list[Any]:
    """The jaxprs that an equation of a jaxpr holds: of its branches, its loop, or what it calls."""
    found = []
    for value in equation.params.values():
        for each in value if isinstance(value, tuple | list) else (value,):
            each = getattr(each, "jaxpr", each)
            if hasattr(each, "eqns"):
                found.append(each)
    return found


def _most_alive(operations: Sequence[_Operation], given: set[int], results: Sequence[int]) -> int:
    readers: dict[int, list[int]] = {}
    for place, operation in enumerate(operations):
        for number in operation.reads:
            readers.setdefault(number, []).append(place)
    kept = set(results)
    virtual = {
        number
        for operation in operations
        for number in operation.makes
        if number not in kept and _needs_no_array(operation, [operations[p].name for p in readers.get(number, [])])
    }
    in_place = {
        operation.makes[0]: operation.reads[0]
        for place, operation in enumerate(operations)
        if operation.name == "dynamic_update_slice"
        and operation.reads[0] not in given | kept
        and readers[operation.reads[0]][-1] == place
    }
    ends = _last_reads(operations, virtual, in_place)
    ends.update(dict.fromkeys(results, len(operations)))
    sizes: Counter[int] = Counter()
    for operation in operations:
        for number, size in zip(operation.makes, operation.sizes, strict=True):
            sizes[number] = 0 if number in virtual or number in in_place else size
    dying: dict[int, list[int]] = {}
    for number in sizes:
        dying.setdefault(ends.get(number, -1), []).append(number)
    alive = most = 0
    for place, operation in enumerate(operations):
        made = sum(sizes[number] for number in operation.makes)
        most = max(most, alive + max(made, operation.inside))
        alive += made
        alive -= sum(sizes[number] for number in dying.get(place, ()))
        alive -= sum(sizes[number] for number in operation.makes if number not in ends)
    return most


def _needs_no_array(operation: _Operation, readers: Sequence[str]) -> bool:
    if operation.name in _VIEWS:
        return True
    if operation.name not in _ELEMENTWISE or not all(each in _FUSED for each in readers):
        return False
    return len(readers) <= 1 or operation.name in _CHEAP


def _last_reads(operations: Sequence[_Operation], virtual: set[int], in_place: Mapping[int, int]) -> dict[int, int]:
    """Where each array is read last, also through those that are none, or are what became of it, by `in_place`."""
    ends: dict[int, int] = {}
    for place in range(len(operations) - 1, -1, -1):
        operation = operations[place]
        through = max((ends.get(number, place) for number in operation.makes if number in virtual), default=place)
        for number in operation.reads:
            ends[number] = max(ends.get(number, -1), place, through)
        for number in operation.makes:
            if number in in_place:
                ends[in_place[number]] = max(place, ends.get(number, place))
    return ends


def _is_variable(atom: Any) -> bool:
    return not hasattr(atom, "val")


_pairs = functools.partial(zip, strict=True)


def _shape(variable: Any) -> tuple[int, ...] | None:
    return getattr(variable.aval, "shape", None)


def _bytes(variable: Any) -> int:
    shape, dtype = _shape(variable), getattr(variable.aval, "dtype", None)
    if shape is None or dtype is None:
        return 0
    size = np.dtype(dtype).itemsize if not jnp.issubdtype(dtype, jax.dtypes.extended) else 8
    return math.prod(shape) * size
