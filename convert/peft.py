"""LoRA files as peft writes them: pairs of matrices by the name of the module they adapt, and their scale.

Also read: the same keys without peft's prefix or under `diffusion_model.`, and pairs named `lora_down` and `lora_up`
with an `alpha` for each, as other trainers write them.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert.layout import PICKLES, SAFETENSORS
from convert.sources import Source, open_source
from osjax.errors import OsjaxError

CONFIG = "adapter_config.json"
_STEM = "adapter_model"

_KEY = re.compile(
    r"(?:base_model\.model\.|diffusion_model\.)?(?P<module>.+)\."
    r"(?:(?P<a>lora_(?:A|down)(?:\.default)?\.weight)|(?P<b>lora_(?:B|up)(?:\.default)?\.weight)|(?P<alpha>alpha))"
)

# Options that say what is computed, and those that tell only how the adapter came to be. Any other must be unset: it
# changes what is computed in a way that is not known here, or adapts what is not in the pairs.
_READ = frozenset({"r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora"})
_TOLD = frozenset(
    {
        "auto_mapping",
        "base_model_name_or_path",
        "eva_config",
        "exclude_modules",
        "inference_mode",
        "layers_pattern",
        "layers_to_transform",
        "lora_dropout",
        "megatron_core",
        "peft_version",
        "qalora_group_size",
        "revision",
        "target_modules",
        "task_type",
    }
)
# Values that are as good as unset. The other ways to start change the model's own weights too.
_PLAIN = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, "gaussian", "eva", "orthogonal"),
}


@dataclasses.dataclass(frozen=True)
class Settings:
    """What peft's LoraConfig says about scales; patterns are for modules that differ, and match their last names."""

    rank: int
    alpha: float
    rank_pattern: Mapping[re.Pattern[str], int]
    alpha_pattern: Mapping[re.Pattern[str], float]
    rslora: bool

    def scale(self, module: str, rank: int) -> float:
        """alpha / rank, or alpha / √rank (rank-stabilised, Kalajdzievski 2023). Raises OsjaxError for another rank."""
        expected = _matching(self.rank_pattern, module, self.rank)
        if rank != expected:
            raise OsjaxError(f"{module} has rank {rank}, {CONFIG} says {expected}: take both from the same training")
        return _matching(self.alpha_pattern, module, self.alpha) / (math.sqrt(rank) if self.rslora else rank)


@dataclasses.dataclass(frozen=True)
class Pair:
    """One module's adapter: the weight changes by scale · b @ a. a [R, in] and b [out, R] in float32, from `keys`."""

    a: np.ndarray
    b: np.ndarray
    scale: float
    keys: tuple[str, str]


def find_adapter(source: Path) -> Path | None:
    """The LoRA file that `source` is, or that lies in it as peft saves it; None if it is something else."""
    if source.is_dir():
        files = [source / f"{_STEM}{ending}" for ending in (SAFETENSORS, *PICKLES)]
        return next((file for file in files if file.is_file()), None)
    if not source.is_file() or source.suffix not in (SAFETENSORS, *PICKLES):
        return None
    return source if any((match := _KEY.fullmatch(key)) and match["a"] for key in open_source(source).shapes) else None


def read_adapter(file: Path) -> dict[str, Pair]:
    """The pairs of a LoRA file by the modules' names, scaled as the config beside it says.

    Without a config and without alphas in the file the scale is 1. Raises one OsjaxError that lists the keys that are
    no part of a pair, or if the config is unreadable or asks for more than plain LoRA.
    """
    source = open_source(file)
    config = file.with_name(CONFIG)
    settings = _read_settings(config) if config.is_file() else None
    keys: dict[str, dict[str, str]] = {}
    problems = []
    for key in source.shapes:
        match = _KEY.fullmatch(key)
        part = match and match.lastgroup
        if not match or part in keys.setdefault(match["module"], {}):
            problems.append(key)
        else:
            keys[match["module"]][part] = key
    problems += [key for parts in keys.values() if not {"a", "b"} <= parts.keys() for key in parts.values()]
    if problems or not keys:
        raise OsjaxError(
            f"{file} is no plain LoRA ({', '.join(problems) or 'it is empty'}): give pairs of lora_A and lora_B only"
        )
    return {module: _read_pair(source, module, parts, settings) for module, parts in keys.items()}


def _read_pair(source: Source, module: str, keys: Mapping[str, str], settings: Settings | None) -> Pair:
    a, b = (source.read(keys[part]).astype(np.float32) for part in ("a", "b"))
    if a.ndim != 2 or b.ndim != 2 or len(a) != b.shape[1] or not len(a):
        raise OsjaxError(f"{module} has factors of {a.shape} and {b.shape}: a LoRA's are (rank, in) and (out, rank)")
    scale = settings.scale(module, len(a)) if settings else 1.0
    if "alpha" in keys:
        alpha = source.read(keys["alpha"])
        if alpha.size != 1:
            raise OsjaxError(f"{keys['alpha']} holds {alpha.size} numbers: an alpha is one")
        scale = float(alpha.item()) / len(a)
    return Pair(a, b, scale, (keys["a"], keys["b"]))


def _read_settings(path: Path) -> Settings:
    try:
        options: dict[str, Any] = json.loads(path.read_bytes())
        foreign = [
            f"{name} = {value!r}"
            for name, value in options.items()
            if value and name not in _READ | _TOLD and value not in _PLAIN.get(name, ())
        ]
        if foreign:
            raise OsjaxError(f"{path} asks for more than plain LoRA ({', '.join(foreign)}): train the adapter without")
        return Settings(
            rank=int(options["r"]),
            alpha=float(options["lora_alpha"]),
            rank_pattern=_pattern(options.get("rank_pattern") or {}, int),
            alpha_pattern=_pattern(options.get("alpha_pattern") or {}, float),
            rslora=bool(options.get("use_rslora", False)),
        )
    except (OSError, ValueError, TypeError, KeyError, AttributeError, re.error) as error:
        raise OsjaxError(f"{path} is no usable {CONFIG} ({error}): mend it, or get the adapter again") from error


def _pattern(given: Mapping[str, Any], kind: type) -> dict[re.Pattern[str], Any]:
    """Keys match the whole of a module's name, or all behind a dot in it."""
    return {re.compile(rf"(?:.*\.)?(?:{key})"): kind(value) for key, value in given.items()}


def _matching(patterns: Mapping[re.Pattern[str], Any], module: str, default: Any) -> Any:
    """The value of the first pattern that matches."""
    return next((value for pattern, value in patterns.items() if pattern.fullmatch(module)), default)
