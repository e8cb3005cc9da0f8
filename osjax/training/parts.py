"""The models of a run: where they come from, which of them are trained, and how they become a bundle.

Weights are flat dictionaries with names `component.leaf`. What is trained is kept in float32, what is frozen in the
dtype of the computation.
"""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, Sharding

from osjax import files, leaves
from osjax.bundle import Bundle, Component, read_bundle, write_manifest
from osjax.checkpoint import load_component, save_module
from osjax.errors import OsjaxError
from osjax.models.quantized import FULL
from osjax.parallel.weights import weight_spec
from osjax.residency import MODELS, abstract_model, model_config
from osjax.training.initial import initialise
from osjax.training.state import Weights


@dataclasses.dataclass(frozen=True)
class Parts:
    """modules: component → its abstract module in the dtype of the computation; folders: of those that were loaded;
    digest, settings: of the bundle that they were loaded from, empty if there is none."""

    components: Mapping[str, Component]
    modules: Mapping[str, nnx.Module]
    trained: tuple[str, ...]
    folders: Mapping[str, Path]
    digest: str
    settings: Mapping[str, Any]

    def build(self, *weights: Weights) -> dict[str, Any]:
        """Modules from weights that together name every leaf of some components, cast to the computation's dtype."""
        given = {name: array for some in weights for name, array in some.items()}
        built = {}
        for component, module in self.modules.items():
            targets = leaves.flatten(module)
            arrays = {leaf: given.get(f"{component}.{leaf}") for leaf in targets}
            if any(array is not None for array in arrays.values()):
                cast = {leaf: array.astype(targets[leaf].dtype) for leaf, array in arrays.items()}
                built[component] = leaves.unflatten(module, cast)
        return built


def open_parts(
    ckpt_path: str | None, new: Mapping[str, Mapping[str, Any]], trained: Sequence[str], dtype: jnp.dtype
) -> Parts:
    """The components of a bundle, and new ones in place of or beside them; reads no weights.

    new: component → kind, tokenizer, max_length, and the fields of that model's config. Raises OsjaxError for a bundle
    that cannot be read or is in 8 bits, a component that is described wrongly, or one to train that there is not.
    """
    bundle = read_bundle(ckpt_path) if ckpt_path else None
    components = dict(_held(bundle)) | {name: _described(name, options) for name, options in new.items()}
    small = sorted(name for name, each in components.items() if each.precision != FULL)
    if small:
        raise OsjaxError(f"{', '.join(small)} of {ckpt_path} is in 8 bits: train with weights converted in full")
    missing = sorted(set(trained) - set(components))
    if missing:
        held = ", ".join(components) or "nothing"
        raise OsjaxError(f"there is no {', '.join(missing)} to train (there is {held}): give ckpt_path or new")
    modules = {name: abstract_model(component, dtype) for name, component in components.items()}
    folders = {name: bundle.folder(name) for name in components if bundle and name not in new}
    digest, settings = (bundle.digest, bundle.settings) if bundle else ("", {})
    return Parts(components, modules, tuple(trained), folders, digest, settings)


def load_weights(parts: Parts, mesh: Mesh, key: jax.Array) -> tuple[Weights, Weights]:
    """(trained, frozen) weights on the mesh: read from the bundle, or drawn with `key`, equal on every mesh."""
    trained: Weights = {}
    frozen: Weights = {}
    for index, (name, abstract) in enumerate(parts.modules.items()):
        dtype = jnp.float32 if name in parts.trained else None
        if name in parts.folders:
            placed, shown = _placement(name, abstract, mesh), jax.process_index() == 0
            module = load_component(parts.folders[name], abstract, dtype, placed, progress=shown)
            weights = named(name, leaves.flatten(module))
        else:
            weights = _draw(name, parts.components[name], mesh, jax.random.fold_in(key, index))
        (trained if name in parts.trained else frozen).update(weights)
    return trained, frozen


def export(
    parts: Parts,
    weights: Weights,
    folder: Path,
    changed: Mapping[str, Mapping[str, Any]],
    dtype: jnp.dtype = jnp.bfloat16,
) -> Path:
    """Writes the bundle `folder`, whole or not at all: what was loaded and not trained as it was, the rest in `dtype`.

    changed: component → fields of its config that training has found, such as the autoencoder's scale_factor. A bundle
    of that name is replaced. The manifest, and so its digest, tells weights of equal shapes apart. Raises OsjaxError if
    the disk refuses.
    """
    with files.making_folder(folder, replace=True) as beside:
        modules = parts.build(weights)
        written = {}
        for name, component in parts.components.items():
            if name in parts.trained or name not in parts.folders:
                module = jax.tree.map(lambda leaf: leaf.astype(dtype), modules[name])
                save_module(beside / name, module)
                component = _measured(component, module, dtype, changed.get(name, {}))
            else:
                shutil.copytree(parts.folders[name], beside / name)
            if component.tokenizer is not None:
                shutil.copytree(component.tokenizer, beside / name / "tokenizer", dirs_exist_ok=True)
                component = dataclasses.replace(component, tokenizer=f"{name}/tokenizer")
            written[name] = dataclasses.replace(component, folder=name)
        sources = {name: _identified(component, modules[name]) for name, component in written.items()}
        write_manifest(beside, written, sources, parts.settings)
    return folder


def named(component: str, arrays: Mapping[str, Any]) -> dict[str, Any]:
    """Leaf names with their component in front."""
    return {f"{component}.{leaf}": array for leaf, array in arrays.items()}


def only(weights: Weights, component: str) -> Weights:
    """The weights of one component."""
    return {name: array for name, array in weights.items() if name.startswith(f"{component}.")}


def _held(bundle: Bundle | None) -> Mapping[str, Component]:
    """The bundle's components, their tokenizers by full path."""
    if bundle is None:
        return {}
    return {
        name: dataclasses.replace(each, tokenizer=str(bundle.tokenizer(name)) if each.tokenizer else None)
        for name, each in bundle.components.items()
    }


def _described(name: str, options: Mapping[str, Any]) -> Component:
    config = dict(options)
    kind = config.pop("kind", None)
    if kind not in MODELS:
        raise OsjaxError(f"new.{name}.kind is {kind!r}: use one of {', '.join(MODELS)}")
    about = {key: config.pop(key, None) for key in ("tokenizer", "max_length")}
    if about["tokenizer"] is not None and about["max_length"] is None:
        raise OsjaxError(f"new.{name} has a tokenizer but no max_length: give the tokens of a prompt, such as 64")
    component = Component(kind=kind, config=config, dtype="float32", parameters=0, bytes=0, folder=name, **about)
    return dataclasses.replace(component, config=dataclasses.asdict(model_config(component)))


def _placement(component: str, abstract: nnx.Module, mesh: Mesh) -> Any:
    shapes = {leaf: array.shape for leaf, array in leaves.flatten(abstract).items()}
    return lambda leaf: _sharding(f"{component}.{leaf}", shapes[leaf], mesh)


def _sharding(name: str, shape: tuple[int, ...], mesh: Mesh) -> Sharding:
    return NamedSharding(mesh, weight_spec(name, shape, mesh))


def _draw(name: str, component: Component, mesh: Mesh, key: jax.Array) -> Weights:
    """Random weights in float32, drawn where they are to lie."""

    def make(key: jax.Array) -> Weights:
        return named(name, initialise(component.kind, model_config(component), key))

    shardings = {leaf: _sharding(leaf, array.shape, mesh) for leaf, array in jax.eval_shape(make, key).items()}
    return jax.jit(make, out_shardings=shardings)(key)


def _identified(component: Component, module: nnx.Module) -> dict[str, Any]:
    """A component as a source of its bundle: digest of its leaves, in the dtype that they are stored in, and size."""
    digest = hashlib.sha256()
    for name, array in sorted(leaves.flatten(module).items()):
        held = array if array.is_fully_addressable else multihost_utils.process_allgather(array, tiled=True)
        stored = np.asarray(held).astype(component.dtype)
        digest.update(f"{name} {stored.dtype} {stored.shape}\n".encode())
        digest.update(stored.tobytes())
    return {"sha256": digest.hexdigest(), "bytes": component.bytes}


def _measured(component: Component, module: nnx.Module, dtype: jnp.dtype, changed: Mapping[str, Any]) -> Component:
    arrays = jax.tree.leaves(module)
    return dataclasses.replace(
        component,
        config=dict(component.config) | dict(changed),
        dtype=jnp.dtype(dtype).name,
        parameters=sum(array.size for array in arrays),
        bytes=sum(array.nbytes for array in arrays),
    )
