"""Open-Sora 2.0 in JAX and Flax: text, images and clips to video.

    video = osjax.Pipeline.load("bundle")(osjax.Request(prompt="raining, sea"))

The names are imported on first use: `import osjax` alone touches neither JAX nor a device.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from osjax.pipeline import Pipeline
    from osjax.request import Request
    from osjax.video import Video

__all__ = ["Pipeline", "Request", "Video"]

_HOMES = {"Pipeline": "osjax.pipeline", "Request": "osjax.request", "Video": "osjax.video"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'osjax' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
