"""The measurement of the hand-over from FLUX to the video model: the published sizes, and a rehearsal."""

import json
import sys

from launch import measure_handover
from osjax import random_weights
from osjax.residency import MODELS


def test_published_sizes():
    counts = {
        name: each.parameters / 1e9 for name, each in random_weights.bundle_of(measure_handover.FULL).components.items()
    }
    assert {name: round(count, 2) for name, count in counts.items()} == {
        "t5": 4.76, "clip": 0.12, "image_mmdit": 11.9, "image_vae": 0.08, "mmdit": 11.89, "vae": 0.25,
    }  # fmt: skip
    assert {kind for kind, _, _ in measure_handover.FULL.values()} == MODELS.keys() - {"dc_ae"}


def test_a_rehearsal_goes_through_all_parts(monkeypatch, tmp_path):
    out = tmp_path / "results.json"
    monkeypatch.setattr(sys, "argv", ["measure_handover.py", "--tiny", "--steps", "1", "--out", str(out)])
    measure_handover.main()
    results = json.loads(out.read_text())
    parts = ["texts of the picture", "picture", "texts of the video", "video"]
    assert [name for name in results if isinstance(results[name], dict)] == [
        *(f"moves {name}" for name in measure_handover.TINY), *parts,
    ]  # fmt: skip
    assert results["video"]["seconds"]["references"] > 0
    assert all({"in_use_gb", "peak_gb"} <= results[part].keys() for part in parts)
