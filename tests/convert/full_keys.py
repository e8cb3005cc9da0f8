"""Names and shapes of the published checkpoints, full size."""

import json
from pathlib import Path
from typing import Any

import jax

FOLDER = Path(__file__).parents[1] / "golden" / "full_key_shapes"


def read_full_keys(checkpoint: str) -> tuple[dict[str, Any], dict[str, jax.ShapeDtypeStruct]]:
    """(upstream's options, tensor name → shape and dtype) of one published checkpoint."""
    manifest = json.loads((FOLDER / f"{checkpoint}.json").read_text())
    shapes = {name: jax.ShapeDtypeStruct(tuple(shape), dtype) for name, (shape, dtype) in manifest["tensors"].items()}
    return manifest["config"], shapes
