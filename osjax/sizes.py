"""What a request asks for: in pixels and in latents of the model that is to draw it, of the sampler, and in words."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from osjax.media import read_reference
from osjax.request import Request
from osjax.sampling import geometry
from osjax.sampling.condition import ConditionKind, condition_kind, condition_masks
from osjax.sampling.guidance import Guidance
from osjax.sampling.latents import SamplingOptions
from osjax.text.annotate import annotate


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

    Raises OsjaxError for a size, frame count or kind that cannot be drawn, or a wrong number of references.
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
    if grid.t == 1:  # a single frame ignores references
        return Shape(size, grid, kind, slice(0, frames), 0)
    kind.assign(request.refs)
    condition_masks(kind, grid.t, causal)
    head, tail = kind.padding(causal, ratio)
    return Shape(size, grid, kind, slice(head, frames - tail), kind.reference_frames(causal, ratio))


def read_references(request: Request, shape: Shape) -> list[np.ndarray]:
    """The clips that condition a request, THWC in [-1, 1]: head before tail. A single frame takes none.

    Raises OsjaxError for files that cannot be used.
    """
    if not shape.reference_frames:
        return []
    ends = shape.kind.assign(request.refs)
    return [read_reference(path, shape.reference_frames, *shape.size, from_end=from_end) for path, from_end in ends]


def sampling_options(request: Request) -> SamplingOptions:
    """The part of a request that the sampler reads."""
    scales = Guidance(
        text=request.guidance,
        image=request.guidance_img,
        text_osci=request.text_osci,
        image_osci=request.image_osci,
        scale_temporal_osci=request.scale_temporal_osci,
    )
    return SamplingOptions(request.num_steps, scales, request.shift, request.flow_shift)


def prompt_used(request: Request) -> str:
    """The prompt as the model is to see it, with what it is told of speed and motion."""
    prompt = request.refined_prompt or request.prompt
    return annotate(prompt, request.fps, request.dynamic_score or request.motion_score)
