"""What is written down of a video that a pipeline has drawn."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
from collections.abc import Mapping, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from osjax import provenance
from osjax.kernels.attention import APPROXIMATE
from osjax.models.quantized import FULL
from osjax.request import EXACT, Request
from osjax.roles import Roles, prompt_used, sampling_options

_PLACE = frozenset("/\\~$")


@dataclasses.dataclass(frozen=True)
class Means:
    """What draws: a bundle, by its label and digest, with LoRAs, on a mesh, in a dtype and precision, with an attention
    by name, the transformer's blocks one by one or not."""

    label: str
    digest: str
    loras: tuple[provenance.UsedLoRA, ...]
    mesh: Mesh
    dtype: str
    precision: str
    attention: str
    roles: Roles
    in_blocks: bool = False


def record(
    means: Means,
    requests: Sequence[Request],
    index: int,
    frames: np.ndarray,
    passes: int,
    seconds: Mapping[str, float],
) -> provenance.Provenance:
    """The provenance of one of the requests that were drawn together.

    frames: uint8 [T, H, W, 3]; passes: forward passes that it took in full; seconds: by stage, of all of them.
    """
    request = requests[index]
    return provenance.Provenance(
        prompt=request.prompt,
        prompt_used=prompt_used(request, means.roles),
        negative_prompt=request.negative_prompt,
        seed=request.seed,
        height=frames.shape[1],
        width=frames.shape[2],
        num_frames=len(frames),
        fps=request.fps,
        steps=request.num_steps,
        guidance=dataclasses.asdict(sampling_options(request).guidance),
        cond_type=request.cond_type,
        refs=tuple(provenance.Reference.of(path) for path in request.refs),
        forward_passes=passes,
        seconds={stage: round(value, 3) for stage, value in seconds.items()},
        bundle=means.label,
        bundle_sha256=means.digest,
        osjax_version=importlib.metadata.version("osjax"),
        jax_version=jax.__version__,
        device=means.mesh.devices.flat[0].device_kind,
        mesh=dict(means.mesh.shape),
        dtype=means.dtype,
        attention=means.attention,
        batch_size=len(requests),
        batch_index=index,
        request=dataclasses.asdict(request),
        loras=means.loras,
        precision=means.precision,
        approximate=request.speed != EXACT or means.precision != FULL or means.attention in APPROXIMATE,
        xla_flags=told_flags(os.environ.get("XLA_FLAGS", "")),
        in_blocks=means.in_blocks,
        compiled_kept=bool(jax.config.jax_compilation_cache_dir),
    )


def told_flags(flags: str) -> str:
    """XLA_FLAGS in their order, separated by blanks; what is a place on a disk, or might be, is left out."""
    parts = [flag.partition("=") for flag in flags.split() if flag.startswith("--")]
    return " ".join(name if _PLACE & set(value) else f"{name}{sign}{value}" for name, sign, value in parts)
