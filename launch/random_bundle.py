"""Writes a bundle of the published model's sizes with random weights, as `osjax convert` writes one.

    python -m launch.random_bundle FOLDER       # 34 GB

For measuring what commands take that read their weights from a disk. Its tokenizers are the embedded model's.
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from tqdm import tqdm

from osjax import files, leaves, random_weights
from osjax.bundle import Component, write_manifest
from osjax.checkpoint import PartWriter
from osjax.errors import OsjaxError
from osjax.models.streamed import is_stacked
from osjax.parallel.mesh import MeshShape, make_mesh
from osjax.pipeline import EMBEDDED


def write_component(folder: Path, component: Component, mesh: Mesh) -> None:
    """Draws the component in bf16 and writes it into the folder, which is made, layer by layer as a converter does."""
    folder.mkdir(parents=True)
    writer, module = PartWriter(folder), random_weights.draw(component, mesh, jnp.bfloat16)
    for leaf, array in leaves.flatten(module).items():
        for layer in range(len(array)) if is_stacked(leaf) else [None]:
            writer.add(leaf, layer, np.asarray(array if layer is None else array[layer]))
    writer.close()
    for array in jax.tree.leaves(module):  # the next one takes their place
        array.delete()


def write_bundle(folder: Path, models: Mapping[str, tuple[str, Any, int | None]]) -> None:
    """Makes the folder, whole or not at all; models: as `random_weights.PUBLISHED`. Raises OsjaxError for one that is
    there, or that the disk refuses."""
    components, mesh = dict(random_weights.bundle_of(models).components), make_mesh(MeshShape())
    with files.making_folder(folder) as beside:
        for name, component in tqdm(components.items(), desc="write", unit="model"):
            write_component(beside / name, component, mesh)
            if component.max_length is not None:
                shutil.copytree(EMBEDDED / name / "tokenizer", beside / name / "tokenizer")
                components[name] = dataclasses.replace(component, tokenizer=f"{name}/tokenizer")
        write_manifest(beside, components, {}, {})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the bundle; it must not be there yet")
    try:
        write_bundle(parser.parse_args().folder, random_weights.PUBLISHED)
    except OsjaxError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
