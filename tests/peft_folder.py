"""A folder as peft saves an adapter, made of arrays: what `osjax convert` is given."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

PREFIX = "base_model.model."


def write(
    folder: Path,
    tensors: Mapping[str, np.ndarray],
    settings: Mapping[str, Any] | None = None,
    options: Mapping[str, Any] | None = None,
) -> Path:
    """Writes adapter_model.safetensors and, if given, adapter_config.json and the model's options. Returns `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(
        {name: np.ascontiguousarray(each) for name, each in tensors.items()}, folder / "adapter_model.safetensors"
    )
    for name, content in (("adapter_config.json", settings), ("adapter_model.json", options)):
        if content is not None:
            (folder / name).write_text(json.dumps(dict(content)))
    return folder


def random_tensors(shapes: Mapping[str, tuple[int, int]], ranks: Mapping[str, int], seed: int = 0) -> dict[str, Any]:
    """A and B for modules whose weights are (out, in), by peft's names."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for module, (rows, columns) in shapes.items():
        rank = ranks[module]
        tensors[f"{PREFIX}{module}.lora_A.weight"] = rng.normal(size=(rank, columns)).astype(np.float32)
        tensors[f"{PREFIX}{module}.lora_B.weight"] = rng.normal(size=(rows, rank)).astype(np.float32)
    return tensors
