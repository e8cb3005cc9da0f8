"""What `launch/measure_performance.py` measures: the sizes of models and videos, and how a figure is written down."""

from __future__ import annotations

from typing import Any

from launch.measure_handover import TINY
from osjax import random_weights
from osjax.sampling import geometry

FRAMES, TEXT_TOKENS = 129, 512
SMALL = {"resolution": None, "height": 32, "width": 32, "num_frames": 5}
Figures = dict[str, dict[str, Any]]


def entry(value: float | None, how: str, *, measured: bool = True, **more: Any) -> dict[str, Any]:
    """A figure. measured: whether it was, itself; False for whatever was multiplied or summed, or is missing."""
    rounded = None if value is None else float(f"{value:.5g}")
    return {"value": rounded, "measured": measured and value is not None, "how": how, **more}


def models_of(tiny: bool) -> dict[str, tuple[str, Any, int | None]]:
    """As `random_weights.PUBLISHED`."""
    return {name: (TINY if tiny else random_weights.PUBLISHED)[name] for name in random_weights.PUBLISHED}


def grid_of(size: str, *, tiny: bool) -> geometry.LatentGrid:
    if tiny:
        return geometry.latent_grid(SMALL["height"], SMALL["width"], SMALL["num_frames"])
    return geometry.latent_grid(*geometry.image_size(size, "16:9"), FRAMES)
