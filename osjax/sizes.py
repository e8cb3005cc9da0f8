"""What a request asks for: in pixels and in latents of the model that is to draw it, of the sampler, and in words."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from osjax.errors import OsjaxError
from osjax.media import read_reference
from osjax.request import Request
from osjax.sampling import geometry
from osjax.sampling.condition import CONDITION_KINDS, ConditionKind, condition_kind, condition_masks

CONTINUED = CONDITION_KINDS["v2v_head"]  # how a video goes on, whatever it began with


@dataclasses.dataclass(frozen=True)
class Shape:
    """size: (height, width) in pixels; kept: of the frames that are decoded; reference_frames: of each reference, in
    pixels."""

    size: tuple[int, int]
    grid: geometry.LatentGrid
    kind: ConditionKind
    kept: slice
    reference_frames: int


def shape_of(request: Request, vae: Any, patch: int) -> Shape:
    """The shape of a request for an autoencoder with the config `vae` and an MMDiT of that patch size.

    Raises OsjaxError for a size, frame count or kind that cannot be drawn, a wrong number of references, or a video
    that cannot be extended as the request wants.
    """
    multiple, ratio, causal = vae.spatial_compression_ratio * patch, vae.time_compression_ratio, vae.causal
    if request.resolution is not None:
        size = geometry.image_size(request.resolution, request.aspect_ratio, multiple)
    else:
        size = geometry.round_up_size(request.height, request.width)
    frames = request.num_frames
    geometry.check_frames(frames, ratio, causal)
    if not causal:
        vae.latent_frames(frames)  # refuses a length that its tiles would cut
    grid = geometry.latent_grid(*size, frames, multiple=multiple, patch=patch, ratio=ratio, causal=causal)
    size = (grid.h * vae.spatial_compression_ratio, grid.w * vae.spatial_compression_ratio)
    kind = condition_kind(request.cond_type)
    if request.extend:
        _check_extension(request, kind, CONTINUED.reference_frames(causal, ratio))
    if grid.t == 1:  # a single frame ignores references
        return Shape(size, grid, kind, slice(0, frames), 0)
    kind.assign(request.refs)
    condition_masks(kind, grid.t, causal)
    head, tail = kind.padding(causal, ratio)
    return Shape(size, grid, kind, slice(head, frames - tail), kind.reference_frames(causal, ratio))


def continued(shape: Shape, request: Request, vae: Any) -> Shape:
    """The shape of what a video of `shape` is continued with: its last frames are given and only new ones kept."""
    given = CONTINUED.reference_frames(vae.causal, vae.time_compression_ratio)
    return dataclasses.replace(shape, kind=CONTINUED, kept=slice(given, request.num_frames), reference_frames=given)


def _check_extension(request: Request, kind: ConditionKind, given: int) -> None:
    if request.num_frames == 1:
        raise OsjaxError("an image cannot be extended: leave out --extend, or ask for more frames")
    if kind.tail:
        raise OsjaxError(f"{kind.name} gives how the video ends, so it cannot go on: leave out --extend")
    if request.num_frames <= given:
        raise OsjaxError(
            f"num_frames is {request.num_frames}: to extend a video, whose last {given} frames are given again, ask "
            f"for more than {given}"
        )


def read_references(request: Request, shape: Shape) -> list[np.ndarray]:
    """The clips that condition a request, THWC in [-1, 1]: head before tail. A single frame takes none.

    Raises OsjaxError for files that cannot be used.
    """
    if not shape.reference_frames:
        return []
    ends = shape.kind.assign(request.refs)
    return [read_reference(path, shape.reference_frames, *shape.size, from_end=from_end) for path, from_end in ends]
