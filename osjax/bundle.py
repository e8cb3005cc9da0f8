"""What a model folder holds: bundle.json, and one folder per component.

    BUNDLE/
      bundle.json             format, version, components, sources, settings
      mmdit/ vae/ t5/ clip/   one folder per component:
        index.json            which leaves, and which of their layers, every part holds
        part-00000/ …         Orbax checkpoints of some 64 MB (see `osjax/checkpoint.py`)
        tokenizer/            of text encoders

This file reads and writes the JSON; it never touches an array.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from osjax import files
from osjax.errors import OsjaxError

FORMAT = "osjax-bundle"
VERSION = 1
MANIFEST = "bundle.json"
INDEX = "index.json"


@dataclasses.dataclass(frozen=True)
class Component:
    """One model of a bundle.

    kind: one of `osjax.residency.MODELS`; config: the fields of that model's config dataclass; dtype: of its floating
    leaves as stored, but for what is in 8 bits by `precision` (`osjax.models.quantized`); parameters: of the model in
    full; bytes: of its arrays; folder, tokenizer: relative to the bundle; max_length: tokens of a text encoder's input.
    """

    kind: str
    config: Mapping[str, Any]
    dtype: str
    parameters: int
    bytes: int
    folder: str
    tokenizer: str | None = None
    max_length: int | None = None
    precision: str = "full"


@dataclasses.dataclass(frozen=True)
class Bundle:
    """A bundle's manifest. `path`: its folder; `digest`: SHA-256 of bundle.json, which identifies the weights.

    sources: checkpoint file, or component of a bundle that was trained, → its {"sha256", "bytes"}; settings: options of
    generation that this model wants.
    """

    path: Path
    digest: str
    components: Mapping[str, Component]
    sources: Mapping[str, Mapping[str, Any]]
    settings: Mapping[str, Any]
    osjax: str

    def component(self, name: str) -> Component:
        """The component of that name. Raises OsjaxError if the bundle has none."""
        if name not in self.components:
            held = ", ".join(self.components)
            raise OsjaxError(f"bundle {self.path} has no {name} (it holds {held}): convert that checkpoint too")
        return self.components[name]

    def folder(self, name: str) -> Path:
        return self.path / self.component(name).folder

    def tokenizer(self, name: str) -> Path:
        """The folder of a text encoder's tokenizer. Raises OsjaxError if the component has none."""
        tokenizer = self.component(name).tokenizer
        if tokenizer is None:
            raise OsjaxError(f"{name} in bundle {self.path} has no tokenizer: convert it from a folder that holds one")
        return self.path / tokenizer


def read_bundle(path: str | Path) -> Bundle:
    """Reads a bundle's manifest and checks that every folder it names is there.

    Raises OsjaxError if there is no bundle, it is damaged or incomplete, or another version of osjax wrote it.
    """
    path = Path(path)
    try:
        text = (path / MANIFEST).read_bytes()
    except OSError as error:
        raise OsjaxError(f"no bundle at {path} (no readable {MANIFEST}): make one with osjax convert") from error
    try:
        manifest = json.loads(text)
        if manifest["format"] != FORMAT:
            raise ValueError("another format")
        version = manifest["version"]
    except (ValueError, TypeError, KeyError) as error:
        raise _damaged(path / MANIFEST) from error
    if version != VERSION:
        raise OsjaxError(f"bundle {path} has version {version}, this osjax reads {VERSION}: convert it again")
    try:
        components = {
            name: Component(**(entry | {"config": _tuples(entry["config"])}))
            for name, entry in manifest["components"].items()
        }
        bundle = Bundle(
            path=path,
            digest=hashlib.sha256(text).hexdigest(),
            components=components,
            sources=dict(manifest["sources"]),
            settings=dict(manifest["settings"]),
            osjax=str(manifest["osjax"]),
        )
        needed = [f"{each.folder}/{INDEX}" for each in components.values()]
        needed += [each.tokenizer for each in components.values() if each.tokenizer]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise _damaged(path / MANIFEST) from error
    missing = [name for name in needed if not (path / name).exists()]
    if missing:
        raise OsjaxError(f"bundle {path} is incomplete ({', '.join(missing)} missing): copy it whole, or convert again")
    return bundle


def write_manifest(
    path: str | Path,
    components: Mapping[str, Component],
    sources: Mapping[str, Mapping[str, Any]],
    settings: Mapping[str, Any],
) -> None:
    """Writes bundle.json into the folder `path`, whole or not at all; the components' folders come before it."""
    manifest = {
        "format": FORMAT,
        "version": VERSION,
        "osjax": importlib.metadata.version("osjax"),
        "components": {name: dataclasses.asdict(component) for name, component in components.items()},
        "sources": dict(sources),
        "settings": dict(settings),
    }
    _write_json(Path(path) / MANIFEST, manifest)


@dataclasses.dataclass(frozen=True)
class Part:
    """One Orbax checkpoint of a component. leaves: leaf → the layers [start, stop) it holds, or None for all of it.

    bytes: of its files on disk, which shows a truncated copy without reading it.
    """

    name: str
    bytes: int
    leaves: Mapping[str, tuple[int, int] | None]


def read_index(folder: Path) -> tuple[Part, ...]:
    """The parts of a component's folder, each there in full. Raises OsjaxError."""
    try:
        entries = json.loads((folder / INDEX).read_bytes())["parts"]
        parts = tuple(Part(each["name"], each["bytes"], _tuples(each["leaves"])) for each in entries)
    except OSError as error:
        raise OsjaxError(f"no component at {folder} (no readable {INDEX}): copy the bundle whole") from error
    except (ValueError, TypeError, KeyError) as error:
        raise _damaged(folder / INDEX) from error
    broken = [part.name for part in parts if bytes_on_disk(folder / part.name) != part.bytes]
    if broken:
        raise OsjaxError(f"{folder} is incomplete ({', '.join(broken)}): copy the bundle whole, or convert again")
    return parts


def write_index(folder: Path, parts: list[Part]) -> None:
    """Writes a component's index.json, whole or not at all; the parts come before it."""
    _write_json(folder / INDEX, {"parts": [dataclasses.asdict(part) for part in parts]})


def bytes_on_disk(folder: Path) -> int:
    """Bytes of all files below a folder; 0 if it is missing."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with files.replacing(path) as temporary:
        temporary.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _tuples(value: Any) -> Any:
    """JSON's lists as tuples, as config dataclasses have them."""
    if isinstance(value, dict):
        return {key: _tuples(item) for key, item in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _damaged(path: Path) -> OsjaxError:
    return OsjaxError(f"{path} is damaged: copy the bundle again, or convert again")
