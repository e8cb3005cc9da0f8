"""Whether what is asked for fits on the devices, before anything is loaded or drawn.

Weights are counted off the bundle's manifest. What a stage makes beside them is read off the trace of the very function
that the pipeline runs (`osjax/liveness.py`), on shapes alone; a tenth is added for what libraries use for themselves.
How close it is, for the published model in bf16 on one H100 (docs/performance.md): 256px 25.2 GB where 24.6 were
measured, 768px 30.6 where 29.2 were, decoding 256px 18.4 where 17 were. Nothing was measured of text encoding, encoding
references, meshes of several devices, the high-compression model, or decoding at 768px. CPUs compute convolutions of 16
bits in float32 and need more than it says.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh

from osjax.bundle import Bundle
from osjax.kernels.attention import Attention
from osjax.kernels.attention_ref import reference_attention
from osjax.liveness import peak_bytes, tree_bytes
from osjax.media import to_uint8
from osjax.models.rngs import ModuleRngs
from osjax.models.rope import Rope
from osjax.parallel.mesh import MeshShape
from osjax.parallel.ulysses import JointSequence
from osjax.request import Request
from osjax.residency import MODELS, model_config
from osjax.sampling import guidance
from osjax.sampling.denoise import Branches, Where, euler_step
from osjax.sampling.geometry import LatentGrid
from osjax.sizes import Shape, prompt_used, sampling_options, shape_of

MARGIN = 1.1
BRANCHES = 3  # of guidance, whose inputs wait on the device whether they are computed or not
GB = 1e9
_Abstract = jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True)
class Setting:
    """What memory depends on: requests that are drawn together, on which devices, in what dtype, with which attention
    (by the name that was chosen)."""

    requests: tuple[Request, ...]
    mesh: MeshShape
    dtype: jnp.dtype
    offload: bool
    attention: str


@dataclasses.dataclass(frozen=True)
class Stage:
    """One stage on each device. weights: GB of the models that are there; activations: GB of all else it makes."""

    name: str
    weights: float
    activations: float

    @property
    def total(self) -> float:
        return self.weights + self.activations


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a setting takes. size: height, width in pixels; tokens: of one video, without and with the text's;
    passes: forward passes for each video; weights: model → GB on each device; stages in the order in which they run."""

    setting: Setting
    size: tuple[int, int]
    frames: int
    grid: LatentGrid
    text_tokens: int
    passes: int
    parameters: Mapping[str, int]
    weights: Mapping[str, float]
    stages: tuple[Stage, ...]

    @property
    def peak(self) -> Stage:
        """The stage that needs the most."""
        return max(self.stages, key=lambda stage: stage.total)

    def fits(self, room: float | None) -> bool | None:
        """Whether it does into `room` GB on each device; None if that is not known."""
        return None if room is None else self.peak.total <= room


def estimate(bundle: Bundle, setting: Setting) -> Estimate:
    """Traces each stage on shapes. Raises OsjaxError for a request that the bundle cannot draw."""
    first = setting.requests[0]
    configs = {name: model_config(bundle.component(name)) for name in ("mmdit", "vae", "t5", "clip")}
    shape = shape_of(first, configs["vae"], configs["mmdit"].patch_size)
    itemsize = np.dtype(setting.dtype).itemsize
    parameters = {name: bundle.component(name).parameters for name in ("t5", "clip", "vae", "mmdit")}
    weights = {name: count * itemsize / GB for name, count in parameters.items()}
    needs = _activations(bundle, setting, shape)
    stages, resident = [], []
    for name, (model, activations) in needs.items():
        resident = [model] if setting.offload else [*dict.fromkeys([*resident, model])]
        held = sum(weights[each] for each in resident)
        stages.append(Stage(name, held, MARGIN * activations / GB))
    return Estimate(
        setting=setting,
        size=shape.size,
        frames=shape.kept.stop - shape.kept.start,
        grid=shape.grid,
        text_tokens=bundle.component("t5").max_length,
        passes=_passes(setting.requests, shape),
        parameters=parameters,
        weights=weights,
        stages=tuple(stages),
    )


def _passes(requests: Sequence[Request], shape: Shape) -> int:
    options = sampling_options(requests[0])
    plan = guidance.plan(
        options.guidance,
        options.steps,
        shape.grid.t,
        image_condition=shape.kind.is_image,
        same_text=all(prompt_used(request) == request.negative_prompt for request in requests),
        same_condition=not shape.reference_frames or not any(request.refs for request in requests),
    )
    return guidance.forward_passes(plan)


def _activations(bundle: Bundle, setting: Setting, shape: Shape) -> dict[str, tuple[str, int]]:
    """Stage → (its model, bytes that it makes on each device), in order; references only where there are some."""

    def model(name: str) -> tuple[str, Any, jnp.dtype]:
        component = bundle.component(name)
        return component.kind, model_config(component), setting.dtype

    count, length = len(setting.requests), bundle.component("t5").max_length
    found = {
        "text (T5)": ("t5", _text_bytes(*model("t5"), count, length)),
        "text (CLIP)": ("clip", _text_bytes(*model("clip"), count, bundle.component("clip").max_length)),
    }
    if shape.reference_frames and any(request.refs for request in setting.requests):
        found["references (VAE encode)"] = "vae", _encode_bytes(*model("vae"), (shape.reference_frames, *shape.size))
    denoise = _denoise_bytes(*model("mmdit"), count, length, shape.grid, setting.mesh, setting.attention)
    found["denoise"] = "mmdit", denoise
    found["decode (VAE)"] = "vae", _decode_bytes(*model("vae"), count, shape.grid)
    return found


# Each is kept: settings that are compared differ in few of their stages.
@functools.cache
def _model(kind: str, config: Any, dtype: jnp.dtype) -> nnx.Module:
    return nnx.eval_shape(lambda: MODELS[kind][0](config, rngs=ModuleRngs(0), dtype=dtype))


@functools.cache
def _text_bytes(kind: str, config: Any, dtype: jnp.dtype, count: int, length: int) -> int:
    ids_bl = _Abstract((count, length), jnp.int32)
    return peak_bytes(lambda encoder, ids_bl: encoder(ids_bl), _model(kind, config, dtype), ids_bl)


@functools.cache
def _encode_bytes(kind: str, config: Any, dtype: jnp.dtype, size: tuple[int, int, int]) -> int:
    clip = _Abstract((1, *size, 3), dtype)
    encode = peak_bytes(lambda vae, clip_bthwc: vae.encode(clip_bthwc), _model(kind, config, dtype), clip)
    return tree_bytes(clip) + encode


@functools.cache
def _decode_bytes(kind: str, config: Any, dtype: jnp.dtype, count: int, grid: LatentGrid) -> int:
    """Of one video, with the latents of all."""
    z_bthwc = _Abstract(grid.noise_shape(config.latent_channels), jnp.float32)
    decode = peak_bytes(lambda vae, z_bthwc: to_uint8(vae.decode(z_bthwc)), _model(kind, config, dtype), z_bthwc)
    return count * tree_bytes(z_bthwc) + decode


@functools.cache
def _denoise_bytes(
    kind: str,
    config: Any,
    dtype: jnp.dtype,
    count: int,
    length: int,
    grid: LatentGrid,
    mesh: MeshShape,
    attention: str,
) -> int:
    sequence = JointSequence(length, grid.tokens, mesh.seq)
    length, tokens = length + sequence.text_padding, grid.tokens + sequence.image_padding
    rows = count + -count % mesh.data
    f32 = functools.partial(_Abstract, dtype=jnp.float32)
    angles = f32((1, tokens, config.head_dim // 2))
    inputs = (
        f32((rows, tokens, config.in_channels)),
        Branches(
            _Abstract((BRANCHES, rows, length, config.context_in_dim), dtype),
            _Abstract((BRANCHES, rows, config.vec_in_dim), dtype),
            f32((BRANCHES, rows, tokens, config.cond_channels)) if config.cond_embed else None,
        ),
        Rope(angles, angles),
        f32((BRANCHES, tokens)),
        _Abstract((BRANCHES,), jnp.int32),
        _Abstract((), jnp.int32),
        f32(()),
        f32(()),
        f32((rows,)) if config.guidance_embed else None,
    )
    axes = dataclasses.asdict(mesh)
    where = Where(AbstractMesh(tuple(axes.values()), tuple(axes)), _traced_attention(attention))
    step = functools.partial(euler_step, sequence=sequence, where=where)
    return tree_bytes(inputs) // mesh.devices + peak_bytes(step, _model(kind, config, dtype), *inputs)


def _traced_attention(name: str) -> Attention:
    return reference_attention if name == "xla" else _fused


def _fused(q_bnhd: jax.Array, k_bmhd: jax.Array, v_bmhd: jax.Array) -> jax.Array:
    """Stands in for a fused kernel when traced: it reads three arrays and makes one, and is never run."""
    return jax.pure_callback(_never, _Abstract(q_bnhd.shape, q_bnhd.dtype), q_bnhd, k_bmhd, v_bmhd)


def _never(*arrays: Any) -> Any:
    raise AssertionError("a stand-in that is only traced was run")
