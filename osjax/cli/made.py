"""Which of the videos that are asked for are there already, and by what they are known."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from osjax import provenance
from osjax.errors import OsjaxError
from osjax.request import Request

if TYPE_CHECKING:
    from osjax.pipeline import Pipeline


def is_made(request: Request, stem: Path, pipeline: Pipeline) -> bool:
    """Whether the request's video is there, whole, and was made for the same request with the same weights, dtype and
    precision, from references that have not changed since. stem: the path of its files without their endings."""
    there = found(request, stem)
    if there is None:
        return False
    made = there.request, there.bundle_sha256, there.dtype, there.precision, lora_digests(there.loras)
    means = pipeline.bundle.digest, pipeline.dtype, pipeline.residency.precision, lora_digests(pipeline.loras)
    if made != (request.recorded(), *means):
        return False
    return [ref.sha256 for ref in there.refs] == [provenance.Reference.of(path).sha256 for path in request.refs]


def found(request: Request, stem: Path) -> provenance.Provenance | None:
    """How the video was made that lies where the request's belongs, if one does."""
    if not provenance.is_finished(stem, request.num_frames):
        return None
    try:
        return provenance.read(provenance.result_path(stem, request.num_frames))
    except OsjaxError:  # a file of another program's: ours takes its place
        return None


def lora_digests(loras: Sequence[provenance.UsedLoRA]) -> list[tuple[str, float]]:
    """What of LoRAs decides the weights: folders may be renamed."""
    return [(each.sha256, each.weight) for each in loras]
