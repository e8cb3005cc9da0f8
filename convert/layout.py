"""Which file is which component, and what lies beside it: its config and its tokenizer.

A source is upstream's `ckpts/` folder, a folder of one model as Hugging Face ships it, or one checkpoint file.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from osjax.errors import OsjaxError

SAFETENSORS = ".safetensors"
PICKLES = (".pt", ".pth", ".bin", ".ckpt")
INDEX = ".index.json"  # behind one of the others: which tensor is in which shard


@dataclasses.dataclass(frozen=True)
class Kind:
    """A kind of model: its component in a bundle, the tokens that a text encoder is given."""

    name: str
    component: str
    max_length: int | None = None


KINDS = (
    Kind("mmdit", "mmdit"),
    Kind("hunyuan_vae", "vae"),
    Kind("t5", "t5", max_length=512),
    Kind("clip", "clip", max_length=77),
    Kind("dc_ae", "vae"),
    Kind("flux", "image_mmdit"),
    Kind("autoencoder_2d", "image_vae"),
)

_TEXT_ENCODERS = {"t5": "google/t5-v1_1-xxl", "clip": "openai/clip-vit-large-patch14"}
# The published models: what each is made of, and where that lies under `ckpts/`.
PLACES: dict[str, dict[str, str]] = {
    "open_sora_v2": {
        "mmdit": "Open_Sora_v2",
        "hunyuan_vae": "hunyuan_vae",
        **_TEXT_ENCODERS,
        "flux": "flux1-dev",
        "autoencoder_2d": "flux1-dev-ae",
    },
    "high_compression": {"mmdit": "Open_Sora_v2_Video_DC_AE", "dc_ae": "F32T4C128_AE", **_TEXT_ENCODERS},
}
NEEDED = ("mmdit", "vae", "t5", "clip")  # components without which nothing can be generated

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "spiece.model",
    "vocab.json",
    "merges.txt",
)

# Names under which every model is shipped: a config.json beside one of these is that model's.
_GENERIC = ("model", "pytorch_model", "diffusion_pytorch_model")
_ENDINGS = (SAFETENSORS, SAFETENSORS + INDEX, *PICKLES, *(ending + INDEX for ending in PICKLES))
_NO_LIMIT = 100_000  # transformers writes 1e30 into model_max_length where there is none


@dataclasses.dataclass(frozen=True)
class Found:
    """A checkpoint (`file`: tensors or an index of shards) and its kind, None if its place does not tell."""

    file: Path
    kind: str | None


def find_checkpoints(source: Path, kind: str | None = None, model: str = "open_sora_v2") -> list[Found]:
    """The checkpoints of `source`, in upstream's folder those of `model`; with `kind` only that one, of either model.

    Raises OsjaxError if there is none, or several of which none can be preferred.
    """
    if source.is_file():
        return [Found(source, kind)]
    if not source.is_dir():
        raise OsjaxError(f"{source} is missing: give a checkpoint, a model's folder or upstream's ckpts folder")
    places = PLACES[model] if kind is None else _places_of(kind, model)
    placed = [(name, _at_place(source / place)) for name, place in places.items()]
    found = [Found(file, name) for name, file in placed if file is not None]
    if found:
        return found
    single = _in_folder(source)
    if single is None:
        raise OsjaxError(f"{source} holds no checkpoint that osjax knows: give the file itself, with --as KIND")
    return [Found(single, kind)]


def find_config(file: Path) -> Path | None:
    """The options beside a checkpoint: JSON of the same stem, or config.json of a folder that holds one model."""
    stem = _stem(file)
    candidates = [file.with_name(f"{stem}.json")] + [file.with_name("config.json")] * (stem in _GENERIC)
    return next((path for path in candidates if path.is_file()), None)


def read_options(path: Path) -> dict[str, Any]:
    """Options from JSON: the object itself, or what it holds under "config". Raises OsjaxError."""
    options = _read_json(path)
    inner = options.get("config", options)
    if not isinstance(inner, dict):
        raise OsjaxError(f"{path} holds no table of options: give the model's constructor options as a JSON object")
    return inner


def tokenizer_files(file: Path) -> list[Path]:
    """The tokenizer's files beside a checkpoint."""
    return [path for name in TOKENIZER_FILES if (path := file.with_name(name)).is_file()]


def max_length(kind: Kind, file: Path) -> int | None:
    """Tokens that a text encoder is given: what its tokenizer says, else upstream's number."""
    path = file.with_name("tokenizer_config.json")
    if kind.max_length is None or not path.is_file():
        return kind.max_length
    length = _read_json(path).get("model_max_length")
    return length if isinstance(length, int) and 0 < length < _NO_LIMIT else kind.max_length


def _places_of(kind: str, model: str) -> dict[str, str]:
    """Where that kind lies, in `model` if it is part of it."""
    return {kind: next(PLACES[name][kind] for name in (model, *PLACES) if kind in PLACES[name])}


def _at_place(place: Path) -> Path | None:
    """The checkpoint `place` without its ending, or in the folder of that name."""
    files = [path for ending in _ENDINGS if (path := place.with_name(place.name + ending)).is_file()]
    return files[0] if files else _in_folder(place) if place.is_dir() else None


def _in_folder(folder: Path) -> Path | None:
    """The one checkpoint of a folder: an index of shards rather than a shard, safetensors rather than a pickle."""
    for ending in sorted(_ENDINGS, key=lambda ending: (not ending.startswith(SAFETENSORS), not ending.endswith(INDEX))):
        files = sorted(path for path in folder.iterdir() if path.name.endswith(ending) and path.is_file())
        files = [path for path in files if _stem(path) in _GENERIC] or files
        if len(files) > 1:
            names = ", ".join(path.name for path in files)
            raise OsjaxError(f"{folder} holds several checkpoints ({names}): give the file itself, or add its index")
        if files:
            return files[0]
    return None


def _stem(file: Path) -> str:
    return next(
        file.name.removesuffix(ending) for ending in sorted(_ENDINGS, key=len)[::-1] if file.name.endswith(ending)
    )


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise OsjaxError(f"cannot read {path} as JSON ({error}): mend or remove it") from error
    if not isinstance(content, dict):
        raise OsjaxError(f"{path} holds no JSON object: mend or remove it")
    return content
