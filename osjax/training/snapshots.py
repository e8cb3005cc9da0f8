"""Checkpoints of a run: the newest few, written while training goes on, each whole or not at all.

A run's folder holds `config.json`, what the run was told, and `checkpoints/<step>/` with two Orbax items each: `state`,
the arrays as a flat tree {name: array}, and `extra`, JSON. Orbax writes under a temporary name, which no reader takes
for a checkpoint, and renames when all is on the disk; only then are old ones deleted. So a run that is killed or finds
the disk full while saving goes on from the checkpoint before.

`orbax.checkpoint.CheckpointManager` rather than the training module of its experimental API, whose names still change.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict

from osjax.errors import OsjaxError
from osjax.files import make_folder, replacing

State = Any  # a pytree of jax arrays
Layout = tuple[tuple[int, ...], jnp.dtype]

_CONFIG, _CHECKPOINTS = "config.json", "checkpoints"
# A resumed run has the same weights, bit for bit, as one left alone. These options cannot change them.
_FREE = frozenset(
    {"run.log_every", "run.save_every", "run.keep", "run.sample_every", "run.sample_prompts", "data.workers"}
)


class Snapshots:
    """The checkpoints in a run's folder. All processes of a run make one, of the same folder, and call it alike."""

    def __init__(self, folder: Path, keep: int, config: Mapping[str, Any], force: bool = False):
        """Opens the folder, making it if it is missing, and removes what a killed run left half written.

        keep: how many checkpoints stay; config: what the run is told, nested mappings of what JSON can hold.
        Raises OsjaxError if there is a checkpoint of a run that was told otherwise, unless `force`.
        """
        self._folder = make_folder(folder).absolute()
        logging.getLogger("absl").addFilter(_not_from_orbax)
        self._manager = ocp.CheckpointManager(
            self._folder / _CHECKPOINTS,
            options=ocp.CheckpointManagerOptions(max_to_keep=keep, cleanup_tmp_directories=True),
            # Weights hardly compress, and saving takes half the time without.
            item_handlers={
                "state": ocp.PyTreeCheckpointHandler(use_compression=False),
                "extra": ocp.JsonCheckpointHandler(),
            },
        )
        self._keep_to(json.loads(json.dumps(config)), force)

    def latest(self) -> int | None:
        """The newest step that there is a checkpoint of."""
        return self._manager.latest_step()

    def save(self, step: int, state: State, extra: Mapping[str, Any] | None = None) -> None:
        """Starts to save, after an earlier save has ended; a step that is saved already stays as it is.

        state: a pytree of jax arrays of any dtype, PRNG keys too, none of them empty; it may be donated as soon as this
        returns. extra: what JSON can hold, the same on every process.
        Raises OsjaxError if the disk refuses, now or during the earlier save.
        """
        with self._telling():
            self._manager.wait_until_finished()
            if step not in self._manager.all_steps():
                items = {"state": ocp.args.PyTreeSave(_by_name(state)), "extra": ocp.args.JsonSave(dict(extra or {}))}
                self._manager.save(step, args=ocp.args.Composite(**items), force=True)

    def restore(self, step: int, abstract_state: State) -> tuple[State, dict[str, Any]]:
        """The state and the extra that were saved at `step`.

        abstract_state: `jax.ShapeDtypeStruct`s with shardings, of whatever mesh, in the structure of the saved state.
        Raises OsjaxError if there is no such checkpoint, it is damaged, or its arrays' names, shapes or dtypes differ.
        """
        targets = _by_name(abstract_state)
        place = self._manager.directory / str(step)
        if step not in self._manager.all_steps():
            there = ", ".join(map(str, self._manager.all_steps())) or "none"
            raise OsjaxError(f"no checkpoint of step {step} in {self._manager.directory}: there are {there}")
        try:
            _check_fit(place, self._manager.item_metadata(step)["state"].tree, targets)
            arguments = ocp.checkpoint_utils.construct_restore_args(targets)
            items = {"state": ocp.args.PyTreeRestore(targets, arguments), "extra": ocp.args.JsonRestore()}
            found = self._manager.restore(step, args=ocp.args.Composite(**items))
        except (OsjaxError, jax.errors.JaxRuntimeError):  # the device's trouble, such as too little memory
            raise
        except Exception as error:  # damaged files surface as ValueError, KeyError and as bare Exception too
            raise OsjaxError(
                f"cannot read the checkpoint {place} ({_reason(error)}): delete it to go on from an earlier one"
            ) from error
        arrays = [found["state"][name] for name in targets]
        return jax.tree.unflatten(jax.tree.structure(abstract_state), arrays), found["extra"]

    def wait(self) -> None:
        """Waits until the save that was started last is on the disk. Raises OsjaxError if the disk refuses."""
        with self._telling():
            self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, as `wait` does, and ends the threads."""
        try:
            self.wait()
        finally:
            self._manager.close()

    def _keep_to(self, config: dict[str, Any], force: bool) -> None:
        """Checks `config` against that of the checkpoints, and writes it down for the next time."""
        path = self._folder / _CONFIG
        if self.latest() is not None and not force:
            changed = differences(_read_config(path), config)
            if changed:
                raise OsjaxError(
                    f"{self._folder} was trained with another config ({'; '.join(changed)}): give the old values, "
                    "another --out, or --force True to go on with the new ones"
                )
        if jax.process_index() == 0:
            with replacing(path) as temporary:
                temporary.write_text(json.dumps(config, indent=2) + "\n")

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        """Turns what the disk refuses into one line, which names the checkpoint that is left."""
        try:
            yield
        except (OSError, ValueError) as error:  # a full disk is a ValueError to Orbax's storage layer
            self._manager.reload()
            left = "there is none before it" if self.latest() is None else f"that of step {self.latest()} is whole"
            raise OsjaxError(
                f"cannot save a checkpoint in {self._folder} ({_reason(error)}); {left}: make room and start again"
            ) from error


def exists(folder: Path) -> bool:
    """Whether a run has left a checkpoint in the folder."""
    return any(path.name.isdigit() for path in (folder / _CHECKPOINTS).glob("*"))


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """`key: old -> new` for each option that differs and can change the weights that come out.

    Those that only say what is shown, kept or read ahead never count, and `run.steps` only where the learning rate
    follows a schedule that ends with the run. mesh, attention and remat do count: they change the last bits.
    """
    old, new = (flatten_dict(config, sep=".") for config in (old, new))
    free = _FREE | {"run.steps"} if new.get("optim.schedule") == "constant" else _FREE
    names = [name for name in sorted(old.keys() | new.keys()) if name not in free]
    shown = [(name, _shown(old, name), _shown(new, name)) for name in names]
    return [f"{name}: {before} -> {after}" for name, before, after in shown if before != after]


def _shown(flat: Mapping[str, Any], name: str) -> str:
    return json.dumps(flat[name], ensure_ascii=False) if name in flat else "nothing"


def _read_config(path: Path) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise OsjaxError(f"cannot read {path}, what the run was told: give --force True to go on without") from error


def _by_name(tree: State) -> dict[str, Any]:
    """{path joined with dots: leaf}, in the order of `jax.tree.leaves`.

    Flat, so that what Orbax stores does not depend on the classes that hold the arrays.
    """
    named = {
        jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in jax.tree.leaves_with_path(tree)
    }
    if len(named) != len(jax.tree.leaves(tree)):
        raise ValueError("two leaves of the state have the same name")
    return named


def _check_fit(place: Path, saved: Mapping[str, Any], targets: Mapping[str, Any]) -> None:
    """Orbax would cast, and of wrong shapes it does not tell the name."""
    found = {name: (tuple(leaf.shape), jnp.dtype(leaf.dtype)) for name, leaf in saved.items()}
    wanted = {name: _layout(leaf) for name, leaf in targets.items()}
    wrong = [name for name in sorted(found.keys() | wanted.keys()) if found.get(name) != wanted.get(name)]
    if wrong:
        shown = ", ".join(f"{name} {_text(found.get(name))}, wanted {_text(wanted.get(name))}" for name in wrong[:3])
        more = f", and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise OsjaxError(f"{place} is of another model or optimizer ({shown}{more}): give the config it was made with")


def _layout(leaf: jax.ShapeDtypeStruct) -> Layout:
    """Shape and dtype as they are stored: PRNG keys are stored as the integers they consist of."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.eval_shape(jax.random.key_data, jax.ShapeDtypeStruct(leaf.shape, leaf.dtype))
    return tuple(leaf.shape), jnp.dtype(leaf.dtype)


def _text(layout: Layout | None) -> str:
    return f"{layout[1]}{list(layout[0])}" if layout else "missing"


def _not_from_orbax(record: logging.LogRecord) -> bool:
    """Orbax logs the traceback of a failed save in each of its threads; we raise it, as one line."""
    return "orbax" not in Path(record.pathname).parts


def _reason(error: Exception) -> str:
    """The system's word for it, if there is one in the message, or the first line of a message that may be long."""
    code = re.search(r"os_error_code='(\d+)'", str(error))
    if code:
        return os.strerror(int(code[1])).lower()
    return str(error).split("\n")[0] or type(error).__name__
