"""LoRAs on disk.

    LORA/
      lora.json      format, version, osjax, scale, base (config of the model it is for), projections (their shapes),
                     sha256 (of arrays and scale), metadata
      arrays/        A and B of every projection in float32 (see `osjax/checkpoint.py`)

Provenance tells a LoRA by that digest, which also shows one that was damaged.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Sharding, SingleDeviceSharding

from osjax.checkpoint import load_arrays, save_arrays
from osjax.errors import OsjaxError
from osjax.files import making_folder
from osjax.models import lora
from osjax.models.lora import LoRA

FORMAT = "osjax-lora"
VERSION = 1
MANIFEST = "lora.json"
ARRAYS = "arrays"


@dataclasses.dataclass(frozen=True)
class Adapter:
    """A LoRA as lora.json describes it. lora: its shapes and scale; base: config of the model that it is for."""

    path: Path
    lora: LoRA
    sha256: str
    base: Mapping[str, Any]
    metadata: Mapping[str, Any]

    @property
    def name(self) -> str:
        return self.path.resolve().name


def save(
    folder: str | os.PathLike[str],
    adapter: LoRA,
    base: Any,
    metadata: Mapping[str, Any] | None = None,
    *,
    replace: bool = False,
) -> None:
    """Writes an adapter as the folder `folder`, whole or not at all; it must not exist yet, unless it may be replaced.

    base: config dataclass of the model that it is for; metadata: what JSON takes, such as how it was trained.
    Raises OsjaxError for what the disk refuses.
    """
    arrays = {name: np.asarray(array, np.float32) for name, array in adapter.arrays.items()}
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "osjax": importlib.metadata.version("osjax"),
        "scale": adapter.scale,
        "base": dataclasses.asdict(base),
        "projections": {name: {"a": a.shape, "b": b.shape} for name, (a, b) in adapter.factors.items()},
        "sha256": _digest(arrays, adapter.scale),
        "metadata": dict(metadata or {}),
    }
    with making_folder(folder, replace=replace) as temporary:
        (temporary / ARRAYS).mkdir()
        save_arrays(temporary / ARRAYS, arrays)
        (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


def read(path: str | os.PathLike[str]) -> Adapter:
    """Reads a LoRA's description. Raises OsjaxError if there is none, or another version of osjax wrote it."""
    path = Path(path)
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        if manifest["format"] != FORMAT:
            raise ValueError("another format")
        if manifest["version"] != VERSION:
            version = manifest["version"]
            raise OsjaxError(f"LoRA {path} has version {version}, this osjax reads {VERSION}: convert it again")
        shapes = {
            f"{name}.{part}": jax.ShapeDtypeStruct(tuple(entry[part]), jnp.float32)
            for name, entry in manifest["projections"].items()
            for part in ("a", "b")
        }
        return Adapter(
            path=path,
            lora=LoRA.of_arrays(shapes, float(manifest["scale"])),
            sha256=str(manifest["sha256"]),
            base=dict(manifest["base"]),
            metadata=dict(manifest["metadata"]),
        )
    except OSError as error:
        raise _no_lora(path) from error
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise OsjaxError(f"{path / MANIFEST} is damaged: copy the LoRA again, or convert it again") from error


def load(adapter: Adapter, sharding: Sharding | None = None) -> LoRA:
    """The adapter's arrays, float32, on `sharding` (the first device by default). Raises OsjaxError if damaged."""
    sharding = sharding or SingleDeviceSharding(jax.devices()[0])
    shapes = adapter.lora.arrays
    targets = {name: jax.ShapeDtypeStruct(each.shape, each.dtype, sharding=sharding) for name, each in shapes.items()}
    arrays = load_arrays(adapter.path / ARRAYS, targets)
    if _digest(arrays, adapter.lora.scale) != adapter.sha256:
        raise OsjaxError(
            f"LoRA {adapter.path} is damaged (its content has changed): copy it again, or convert it again"
        )
    return LoRA.of_arrays(arrays, adapter.lora.scale)


def check(adapter: Adapter, model: nnx.Module) -> None:
    """Raises OsjaxError unless the adapter fits the model (abstract or not, with its `config`)."""
    try:
        lora.check(model, adapter.lora)
    except OsjaxError as error:
        ours = json.loads(json.dumps(dataclasses.asdict(model.config)))  # tuples as JSON has them
        differ = [
            f"{name} {adapter.base.get(name)}, not {ours[name]}"
            for name in ours
            if adapter.base.get(name) != ours[name]
        ]
        if not differ:
            raise
        raise OsjaxError(
            f"LoRA {adapter.path} was made for another model ({'; '.join(differ)}): choose one for this bundle"
        ) from error


def _no_lora(path: Path) -> OsjaxError:
    if not path.exists():
        return OsjaxError(f"no LoRA at {path}: check the path (a weight is written PATH:0.8)")
    if path.is_file() or any(path.glob("adapter_*")):
        return OsjaxError(f"{path} is no LoRA of osjax: make one of it with osjax convert {path} FOLDER")
    return OsjaxError(f"{path} is no LoRA (no readable {MANIFEST}): give the folder that osjax wrote")


def _digest(arrays: Mapping[str, Any], scale: float) -> str:
    digest = hashlib.sha256(f"scale {scale}\n".encode())
    for name in sorted(arrays):
        array = np.asarray(arrays[name])
        digest.update(f"{name} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array, "<f4").data)
    return digest.hexdigest()
