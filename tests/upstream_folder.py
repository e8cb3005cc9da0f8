"""A folder laid out like upstream's `ckpts/`, made of golden weights: what `osjax convert` is given."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from convert import infer, layout, tiny_tokenizers
from tests.parity.cases import Case

VOCABULARY = 64  # entries at most: tiny tokenizers know single characters only


def write(folder: Path, *golden: Case, model: str = "open_sora_v2") -> Path:
    """Writes each case's weights where upstream has that kind for `model`, its config beside them, tiny tokenizers.

    Models are single files with a sidecar JSON, text encoders folders as Hugging Face ships them. Returns `folder`.
    """
    for case in golden:
        name = infer.detect_kind(case.weights)  # a golden MMDiT may be FLUX's
        kind = next(kind for kind in layout.KINDS if kind.name == name)
        place = folder / layout.PLACES[model][kind.name]
        if kind.max_length is None:
            weights, config = place.with_name(f"{place.name}.safetensors"), place.with_name(f"{place.name}.json")
        else:
            weights, config = place / "model.safetensors", place / "config.json"
        weights.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: np.ascontiguousarray(tensor) for name, tensor in case.weights.items()}, weights)
        config.write_text(json.dumps(case.config))
        if kind.name == "t5":
            tiny_tokenizers.write_t5(place, min(VOCABULARY, case.config["vocab_size"]))
        if kind.name == "clip":
            tiny_tokenizers.write_clip(place, min(VOCABULARY, case.config["vocab_size"]))
    return folder
