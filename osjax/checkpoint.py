"""Arrays on disk: a component is a few leaves per Orbax checkpoint. The only Orbax import.

The layers of a model are stacked into leaves of many gigabytes, which a converter must not hold and a device should not
hold twice. So a component is saved in parts of some 64 MB, each an Orbax checkpoint of a flat tree {leaf name: array},
in which a stacked leaf may appear with some of its layers; index.json lists which. Loading goes part by part too: whole
leaves land on their shards through Orbax, and layers are written into arrays that are sharded from the start, so that a
model of any size comes onto a mesh of any size with a few parts beside it.

`orbax.checkpoint.experimental.v1` rather than `StandardCheckpointer`: it can save without compression (weights hardly
compress; saving and loading take half the time), it is synchronous, and it loads onto shardings with a plain call.
"""

from __future__ import annotations

import functools
import itertools
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint.experimental.v1 as ocp
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, Sharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

from osjax import leaves
from osjax.bundle import Part, bytes_on_disk, read_index, write_index
from osjax.errors import OsjaxError

PART_BYTES = 64 << 20
BAR_AFTER = 2.0  # seconds of reading: small models need no bar
READ_AHEAD = 8  # parts; reading takes 1.4 to 2 seconds of a core for each GB, so that several must go on at once

Module = TypeVar("Module", bound=nnx.Module)
Array = TypeVar("Array")
Shardings = Sharding | Callable[[str], Sharding]
# (leaf, it or some of its layers, the first of these or None for the whole) → what becomes of it, by leaves' names
Change = Callable[[str, Any, int | None], Mapping[str, Any]]


class PartWriter:
    """Saves whole leaves and layers of stacked ones in parts of about `part_bytes`; holds one part in memory at most.

    `close` writes the index, without which nothing loads.
    """

    def __init__(self, folder: Path, part_bytes: int = PART_BYTES):
        self._folder = folder.absolute()
        self._part_bytes = part_bytes
        self._pending: dict[str, list[tuple[int | None, Any]]] = {}
        self._bytes = 0
        self._parts: list[Part] = []

    def add(self, leaf: str, layer: int | None, array: np.ndarray | jax.Array) -> None:
        """Takes a leaf (`layer` None) or one layer of it."""
        held = self._pending.get(leaf)
        gap = held is not None and held[-1][0] + 1 != layer
        if self._bytes and (gap or self._bytes + array.nbytes > self._part_bytes):
            self._flush()
        self._pending.setdefault(leaf, []).append((layer, array))
        self._bytes += array.nbytes

    def close(self) -> None:
        """Saves what is left and the index."""
        self._flush()
        write_index(self._folder, self._parts)

    def _flush(self) -> None:
        if not self._pending:
            return
        tree, rows = {}, {}
        for leaf, slabs in self._pending.items():
            layers = [layer for layer, _ in slabs]
            rows[leaf] = None if layers == [None] else (layers[0], layers[-1] + 1)
            tree[leaf] = slabs[0][1] if rows[leaf] is None else np.stack([array for _, array in slabs])
        name = f"part-{len(self._parts):05d}"
        _save(self._folder / name, tree)
        self._parts.append(Part(name, bytes_on_disk(self._folder / name), rows))
        self._pending, self._bytes = {}, 0


def save_module(folder: Path, module: nnx.Module, part_bytes: int = PART_BYTES) -> None:
    """Saves a module's arrays, wherever they lie, as a component in `folder`, which must hold none yet."""
    save_arrays(folder, leaves.flatten(module), part_bytes)


def save_arrays(folder: Path, arrays: Mapping[str, np.ndarray | jax.Array], part_bytes: int = PART_BYTES) -> None:
    """The same for arrays by name, of no module."""
    writer = PartWriter(folder, part_bytes)
    for name, array in arrays.items():
        writer.add(name, None, array)
    writer.close()


def _save(path: Path, tree: dict[str, Any]) -> None:
    context = ocp.Context()
    context.array.saving.use_compression = False
    try:
        with context:
            ocp.save(path, tree)
        _forget_path(path)
    except (OSError, ValueError) as error:  # a full disk is a ValueError to Orbax's storage layer
        raise OsjaxError(f"cannot save {path} ({_reason(error)}): check space and rights") from error


def _forget_path(part: Path) -> None:
    """Orbax writes the absolute path into its success marker, of which only the presence counts; a bundle travels."""
    marker = part / "commit_success.txt"
    if marker.exists():
        marker.write_text("committed\n")


def load_component(
    folder: Path,
    abstract_module: Module,
    dtype: jnp.dtype | None = None,
    shardings: Shardings | None = None,
    *,
    stored: nnx.Module | None = None,
    change: Change | None = None,
    progress: bool = False,
) -> Module:
    """Loads a component into a module of the structure of `abstract_module` (made by `nnx.eval_shape`).

    dtype: of the floating leaves, by default as in `abstract_module`; others keep theirs.
    shardings: one for all leaves, or a function leaf name → Sharding; by default all on the first device.
    stored, change, progress: as in `load_arrays`; an abstract module with the shapes and dtypes that are to be read.
    Raises OsjaxError if the folder is incomplete or damaged, or its leaves and shapes are not those of the module.
    """
    targets = _targets(abstract_module, dtype, shardings)
    read = None if stored is None else _targets(stored, dtype, shardings)
    return leaves.unflatten(abstract_module, load_arrays(folder, targets, read, change, progress=progress))


def load_arrays(
    folder: Path,
    targets: Mapping[str, jax.ShapeDtypeStruct],
    stored: Mapping[str, jax.ShapeDtypeStruct] | None = None,
    change: Change | None = None,
    *,
    progress: bool = False,
) -> dict[str, jax.Array]:
    """Loads arrays by name, with the shapes, dtypes and shardings of `targets`.

    change: makes of what has been read what is kept, part by part; stored: what is to be read then, if that differs;
    progress: a bar on standard error, if it takes longer than some seconds. Raises OsjaxError as above.
    """
    parts, stored = read_index(folder), targets if stored is None else stored
    _check_coverage(folder, parts, stored)
    arrays: dict[str, jax.Array] = {}
    for part, loaded in _load_parts(folder, parts, lambda part: _on_shards(part, stored), progress):
        for leaf, array in loaded.items():
            rows = part.leaves[leaf]
            for name, made in _changed(change, leaf, array, rows).items():
                if _is_whole(rows, stored[leaf]):
                    arrays[name] = made
                else:
                    stack = arrays[name] if name in arrays else _empty(targets[name])
                    arrays[name] = _write_rows(stack, made, rows[0])
    # The layers were written under automatic axes; relabelling them as the mesh's own moves nothing.
    return {leaf: jax.device_put(array, targets[leaf].sharding) for leaf, array in arrays.items()}


def load_rows(
    folder: Path,
    targets: Mapping[str, jax.ShapeDtypeStruct],
    stacked: Collection[str],
    keep: Callable[[Any], Array],
    change: Change | None = None,
    *,
    progress: bool = False,
) -> dict[str, Array | list[Array]]:
    """Loads arrays by name into this host's memory, those of `stacked` in a list of their layers.

    targets: shapes and dtypes; change, progress: as in `load_arrays`; keep: what is done with each array or layer then,
    from NumPy's memory into such as is to stay. No device sees them, unless these show them. Only what is stacked may
    lie in several parts. Raises OsjaxError as above.
    """
    parts = read_index(folder)
    _check_coverage(folder, parts, targets)
    found: dict[str, Any] = {}  # name → array, or number of a layer → array
    for part, loaded in _load_parts(folder, parts, lambda part: _in_memory(part, targets), progress):
        for leaf, array in loaded.items():
            rows = part.leaves[leaf]
            for name, made in _changed(change, leaf, array, rows).items():
                if leaf in stacked:
                    found.setdefault(name, {}).update(enumerate(map(keep, made), rows[0] if rows else 0))
                else:
                    found[name] = keep(made)
    return {
        name: [each[layer] for layer in sorted(each)] if isinstance(each, dict) else each
        for name, each in found.items()
    }


def _changed(change: Change | None, leaf: str, array: Any, rows: tuple[int, int] | None) -> Mapping[str, Any]:
    return {leaf: array} if change is None else change(leaf, array, rows[0] if rows else None)


def _targets(
    module: nnx.Module, dtype: jnp.dtype | None, shardings: Shardings | None
) -> dict[str, jax.ShapeDtypeStruct]:
    """The arrays to make: shape, dtype and sharding by leaf name."""
    if shardings is None:
        shardings = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    place = shardings if callable(shardings) else lambda leaf: shardings
    return {
        leaf: jax.ShapeDtypeStruct(
            array.shape,
            dtype if dtype is not None and jnp.issubdtype(array.dtype, jnp.floating) else array.dtype,
            sharding=place(leaf),
        )
        for leaf, array in leaves.flatten(module).items()
    }


def _check_coverage(folder: Path, parts: tuple[Part, ...], targets: Mapping[str, jax.ShapeDtypeStruct]) -> None:
    """Every leaf is held once, by one part or by parts whose layers follow each other."""
    held: dict[str, list[tuple[int, int]]] = {leaf: [] for leaf in targets}
    unknown = sorted({leaf for part in parts for leaf in part.leaves} - set(targets))
    for part in parts:
        for leaf, rows in part.leaves.items():
            if leaf in targets:
                held[leaf].append(rows or (0, _rows(targets[leaf])))
    broken = [leaf for leaf, spans in held.items() if not _tiles(sorted(spans), _rows(targets[leaf]))]
    if unknown or broken:
        raise OsjaxError(
            f"{folder} does not fit its model (unknown: {', '.join(unknown) or 'none'}; missing, incomplete or twice: "
            f"{', '.join(broken) or 'none'}): convert it again"
        )


def _tiles(spans: list[tuple[int, int]], stop: int) -> bool:
    edges = [edge for span in spans for edge in span]
    return (
        edges[:1] == [0]
        and edges[-1:] == [stop]
        and all(a == b for a, b in zip(edges[1:-1:2], edges[2::2], strict=True))
    )


def _rows(target: jax.ShapeDtypeStruct) -> int:
    return target.shape[0] if target.shape else 1


def _is_whole(rows: tuple[int, int] | None, target: jax.ShapeDtypeStruct) -> bool:
    return rows is None or rows == (0, _rows(target))


def _load_parts(
    folder: Path, parts: tuple[Part, ...], wanted: Callable[[Part], Mapping[str, Any]], progress: bool
) -> Iterator[tuple[Part, dict[str, Any]]]:
    """The parts in order, with the next ones being read; one at a time where processes have to agree on the order.

    wanted: for a part, what stands for its arrays as Orbax takes it.
    """
    ahead = READ_AHEAD if jax.process_count() == 1 else 1
    pending: deque[tuple[Part, Future]] = deque()
    coming = iter(parts)
    look = {"unit": "B", "unit_scale": True, "delay": BAR_AFTER, "disable": not progress}
    with (
        tqdm(total=sum(part.bytes for part in parts), desc=f"load {folder.name}", **look) as bar,
        ThreadPoolExecutor(ahead) as pool,
    ):
        for _ in parts:
            for part in itertools.islice(coming, ahead - len(pending)):
                pending.append((part, pool.submit(_load_part, folder / part.name, wanted(part))))
            part, future = pending.popleft()
            yield part, future.result()
            bar.update(part.bytes)


def _load_part(path: Path, wanted: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return ocp.load(path.absolute(), wanted)
    except jax.errors.JaxRuntimeError:  # the device's trouble, such as too little memory
        raise
    except Exception as error:  # damaged files surface as ValueError, and as bare Exception too
        raise OsjaxError(
            f"{path} is damaged or not of this model ({_reason(error)}): copy the bundle or convert again"
        ) from error


def _on_shards(part: Part, targets: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.ShapeDtypeStruct]:
    """Leaves on their final shards, layers on the shards of the stack they belong to."""
    return {
        leaf: targets[leaf] if _is_whole(rows, targets[leaf]) else _some_rows(targets[leaf], rows[1] - rows[0])
        for leaf, rows in part.leaves.items()
    }


def _in_memory(part: Part, targets: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, np.ndarray]:
    """The same as arrays of NumPy; they stand for shapes and types, and are not written."""
    return {
        leaf: np.empty(
            targets[leaf].shape if rows is None else (rows[1] - rows[0], *targets[leaf].shape[1:]), targets[leaf].dtype
        )
        for leaf, rows in part.leaves.items()
    }


def _automatic(sharding: Sharding) -> Sharding:
    """The same placement with automatic axes: explicit ones forbid updates whose layer axis is sharded differently."""
    if isinstance(sharding, NamedSharding):
        mesh = sharding.mesh
        automatic = Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * mesh.devices.ndim)
        return NamedSharding(automatic, sharding.spec)
    return sharding


def _some_rows(target: jax.ShapeDtypeStruct, count: int) -> jax.ShapeDtypeStruct:
    """Some layers of a stacked leaf, sharded like it but for the layer axis, which is whole."""
    sharding = _automatic(target.sharding)
    if isinstance(sharding, NamedSharding):
        sharding = NamedSharding(sharding.mesh, P(None, *sharding.spec[1:]))
    return jax.ShapeDtypeStruct((count, *target.shape[1:]), target.dtype, sharding=sharding)


def _empty(target: jax.ShapeDtypeStruct) -> jax.Array:
    return jnp.zeros(target.shape, target.dtype, device=_automatic(target.sharding))


@functools.partial(jax.jit, donate_argnums=0)
def _write_rows(stack: jax.Array, rows: jax.Array, start: int) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(stack, rows, start, axis=0)


def _reason(error: Exception) -> str:
    """The first sentence of a message that may be pages long."""
    return str(error).split(". ")[0].split("\n")[0] or type(error).__name__
