"""`--use_t2i2v True`: FLUX draws a picture of every prompt first, which the video then starts from.

As upstream does it, the picture has the video's ratio at a resolution of its own, and is scaled down for the video.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from ml_collections import ConfigDict

from osjax import provenance
from osjax.errors import OsjaxError
from osjax.request import Request

if TYPE_CHECKING:
    from osjax.pipeline import Pipeline

FOLDER = "generated_condition"  # beside the videos
COND_TYPE = "i2v_head"


@dataclasses.dataclass(frozen=True)
class Illustration:
    """How pictures are drawn. resolution: by name, as of a video; guidance: told to FLUX."""

    resolution: str
    guidance: float


def read_illustration(config: ConfigDict) -> Illustration | None:
    """The pictures that a configuration asks for, if any. Raises OsjaxError for a resolution that is none."""
    if not config.use_t2i2v:
        return None
    from osjax.sampling.geometry import resolution_pixels  # not above: imports JAX, which has to be prepared first

    resolution_pixels(config.img_resolution)
    return Illustration(config.img_resolution, config.img_guidance)


def picture_of(request: Request, illustration: Illustration, pipeline: Pipeline) -> Request:
    """The request of the picture that a video starts from; `pipeline` draws the video.

    Raises OsjaxError for a video that starts from something else already, or is a picture itself.
    """
    from osjax.sampling.geometry import size_of_image  # not above, as in `read_illustration`

    if request.refs or request.cond_type not in ("t2v", COND_TYPE):
        raise OsjaxError("use_t2i2v draws the first frame itself: leave out --ref and --cond_type")
    if request.num_frames == 1:
        raise OsjaxError("use_t2i2v is for videos, and one frame is an image: give more --num_frames")
    video = dataclasses.replace(request, cond_type="t2v")
    ratio = request.aspect_ratio if request.resolution else None  # with a free size it says nothing
    height, width = size_of_image(illustration.resolution, ratio, pipeline.shape(video).size)
    return Request(
        prompt=request.prompt,
        resolution=None,
        aspect_ratio=None,
        height=height,
        width=width,
        num_frames=1,
        num_steps=request.num_steps,
        guidance=illustration.guidance,
        shift=request.shift,
        flow_shift=request.flow_shift,
        speed=request.speed,
        seed=request.seed,
    )


def picture_stem(stem: Path) -> Path:
    """Where the picture of a video lies, without its ending."""
    return stem.parent / FOLDER / stem.name


def started_from(request: Request, stem: Path) -> Request:
    """The request of a video that starts from the picture at that place."""
    return dataclasses.replace(request, cond_type=COND_TYPE, refs=(str(provenance.result_path(stem, 1)),))
