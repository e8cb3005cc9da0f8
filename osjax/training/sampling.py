"""Sample videos of a run, drawn from weights that are in memory by the pipeline that users have."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from osjax.bundle import Bundle
from osjax.parallel.mesh import MeshShape, make_mesh
from osjax.pipeline import DTYPES, Pipeline
from osjax.request import Request
from osjax.residency import Residency
from osjax.training.options import TrainConfig
from osjax.training.parts import Parts


def draw_prompts(
    parts: Parts, modules: Mapping[str, Any], mesh: Mesh, config: TrainConfig
) -> Iterator[tuple[str, np.ndarray]]:
    """(name, uint8 frames [T, H, W, 3]) for each of `run.sample_prompts`, in the first bucket's size."""
    pipeline = in_memory(parts, modules, mesh, config.run.dtype, config.run.attention)
    for number, prompt in enumerate(config.run.sample_prompts):
        request = Request(
            prompt=prompt,
            resolution=config.data.resolution[0],
            aspect_ratio=config.data.aspect_ratios[0],
            num_frames=config.data.num_frames[0],
            fps=config.data.fps,
            seed=config.run.seed,
        )
        yield f"prompt-{number}", pipeline(request).frames


def in_memory(parts: Parts, modules: Mapping[str, Any], mesh: Mesh, dtype: str, attention: str) -> Pipeline:
    """A pipeline over modules that are there already, an adapter attached or not; all devices draw the same."""
    bundle = Bundle(Path(), "in training", parts.components, {}, {}, importlib.metadata.version("osjax"))
    devices = make_mesh(MeshShape(data=mesh.size), list(mesh.devices.flat))
    residency = Residency(bundle, devices, DTYPES[dtype], offload=False, modules=modules)
    return Pipeline.over(residency, devices, dtype, attention, "in training", progress=False)
