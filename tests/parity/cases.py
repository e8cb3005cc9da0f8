"""Discovery of golden cases: a folder of NAME.json (manifest) + NAME.safetensors (tensors).

The folder is `OSJAX_GOLDEN`, by default the copy in `tests/golden`. Nothing here or in the parity tests is keyed to the
names, sizes or seeds of that copy: another folder of the same format must work unchanged.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

VENDORED = Path(__file__).parents[1] / "golden"  # for tests that need some model, whatever OSJAX_GOLDEN names
FOLDER = Path(os.environ.get("OSJAX_GOLDEN") or VENDORED).resolve()

# Kinds that have a test module.
COVERED = frozenset(
    {"mmdit", "hunyuan_vae", "dc_ae", "autoencoder_2d", "t5", "clip", "sampler", "denoise", "preprocess"}
    | {"end_to_end", "flow", "lora"}
)

PASS_TOLERANCE = 2e-4  # one forward pass in float32; the data itself is within 5e-6 of float64
TRAJECTORY_TOLERANCE = 2e-3  # whole sampling loops
TABLE_TOLERANCE = 1e-6  # schedules and other tables


@dataclasses.dataclass(frozen=True)
class Case:
    """One golden case. `inputs`, `outputs` and `weights` have their prefixes stripped."""

    name: str
    manifest: Mapping[str, Any]
    folder: Path

    @property
    def kind(self) -> str:
        return self.manifest["kind"]

    @property
    def config(self) -> dict[str, Any]:
        return dict(self.manifest["config"])

    @functools.cached_property
    def _tensors(self) -> dict[str, np.ndarray]:
        return load_file(self.folder / f"{self.name}.safetensors")

    def _section(self, prefix: str) -> dict[str, np.ndarray]:
        return {key[len(prefix) :]: value for key, value in self._tensors.items() if key.startswith(prefix)}

    @functools.cached_property
    def inputs(self) -> dict[str, np.ndarray]:
        return self._section("inputs/")

    @functools.cached_property
    def outputs(self) -> dict[str, np.ndarray]:
        return self._section("outputs/")

    @functools.cached_property
    def weights(self) -> dict[str, np.ndarray]:
        """The checkpoint under its original names; from the case named by `weights_from` if it is one name."""
        source = self.manifest.get("weights_from")
        if isinstance(source, str):
            return load(source, self.folder).weights
        return self._section("weights/")

    def weights_case(self, role: str) -> Case:
        """The case that holds the weights of `role` (`weights_from` maps roles to cases)."""
        return load(self.manifest["weights_from"][role], self.folder)

    def run(self, name: str, section: str) -> dict[str, np.ndarray]:
        """The tensors of one run ('inputs' or 'outputs'), without the run's prefix."""
        tensors = self.inputs if section == "inputs" else self.outputs
        return {key[len(name) + 1 :]: value for key, value in tensors.items() if key.startswith(name + ".")}


@functools.cache
def load(name: str, folder: Path = FOLDER) -> Case:
    return Case(name, json.loads((folder / f"{name}.json").read_text()), folder)


@functools.cache
def discover(folder: Path = FOLDER) -> tuple[Case, ...]:
    """All cases of the folder; an empty folder is an error, so that a wrong path cannot pass."""
    found = tuple(load(path.stem, folder) for path in sorted(folder.glob("*.json")))
    if not found:
        raise FileNotFoundError(
            f"no golden cases in {folder}: OSJAX_GOLDEN must name a folder of NAME.json + NAME.safetensors"
        )
    return found


def of_kind(kind: str, folder: Path = FOLDER) -> list[Case]:
    return [case for case in discover(folder) if case.kind == kind]


def runs_of_kind(kind: str) -> list[tuple[Case, str]]:
    """(case, run name) for every run of every case of that kind: parametrize tests with it."""
    return [(case, run) for case in of_kind(kind) for run in case.manifest["runs"]]


def options(case: Case, run: str) -> dict[str, Any]:
    """The case's config with what the run changes in it (runs that change nothing may be a list of names)."""
    runs = case.manifest["runs"]
    return case.config | (runs[run] if isinstance(runs, Mapping) else {})


def case_id(value: object) -> str | None:
    """pytest ids: the case's name, or the run's."""
    return value.name if isinstance(value, Case) else value if isinstance(value, str) else None


def assert_close(actual: Any, reference: np.ndarray, tolerance: float = PASS_TOLERANCE, what: str = "") -> None:
    """max |actual - reference| <= tolerance * max(1, max |reference|), and shapes equal, and no NaN."""
    actual = np.asarray(actual, np.float32)
    assert actual.shape == reference.shape, f"{what}: shape {actual.shape}, reference {reference.shape}"
    error = float(np.max(np.abs(actual - reference), initial=0.0))
    bound = tolerance * max(1.0, float(np.max(np.abs(reference), initial=0.0)))
    assert error <= bound, f"{what}: max error {error:.3g} over {bound:.3g}"
