"""Whether what is asked for fits on the devices, before anything is loaded or drawn.

Weights are counted off the bundle's manifest. What a stage makes beside them is read off the trace of the very function
that the pipeline runs (`osjax/liveness.py`), on shapes alone; a tenth is added for what libraries use for themselves.
How close it is, for the published model in bf16 on one H100 (docs/performance.md): 256px 25.0 GB where 24.6 were
measured, 768px 30.7 where 29.2 were, decoding 256px 9.5 where the compiler planned 8.7. Nothing was measured of text
encoding, encoding references, meshes of several devices, blocks one by one, step caching, the high-compression model,
or decoding at 768px. CPUs compute convolutions of 16 bits in float32 and need more than it says.
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
from jax.sharding import AbstractMesh, AxisType

from osjax.bundle import Bundle, Component
from osjax.kernels.attention import Attention
from osjax.kernels.attention_ref import reference_attention
from osjax.liveness import peak_bytes, tree_bytes
from osjax.media import to_uint8
from osjax.models.mmdit import MMDiT
from osjax.models.operations import FOR_SAMPLING
from osjax.models.quantized import FULL, quantize
from osjax.models.rngs import ModuleRngs
from osjax.models.rope import Rope
from osjax.models.streamed import cut
from osjax.parallel.mesh import MeshShape
from osjax.parallel.ulysses import JointSequence
from osjax.request import Request
from osjax.residency import MODELS, model_config
from osjax.roles import VIDEO, Roles, prompt_used, sampling_options
from osjax.sampling import guidance
from osjax.sampling.caching import SPEEDS, nothing_kept
from osjax.sampling.geometry import LatentGrid
from osjax.sampling.step import Branches, Where, euler_step
from osjax.sampling.streaming import through_double, through_single
from osjax.sizes import Shape, continued, shape_of

MARGIN = 1.1
REFERENCES, DENOISE = "references (VAE encode)", "denoise"  # stages by their names
BRANCHES = 3  # of guidance, whose inputs wait on the device whether they are computed or not
GB = 1e9
_Abstract = jax.ShapeDtypeStruct


@dataclasses.dataclass(frozen=True)
class Setting:
    """What memory depends on: requests that are drawn together, on which devices, in what dtype, with which attention
    (by the name that was chosen), by which components. beside: others that stay on the devices all the while.
    precision: of the transformer's blocks. in_blocks: whether these come one by one, with offloading; in_parts: whether
    they are compiled one by one though all are there (`osjax.residency.Residency`)."""

    requests: tuple[Request, ...]
    mesh: MeshShape
    dtype: jnp.dtype
    offload: bool
    attention: str
    roles: Roles = VIDEO
    beside: tuple[str, ...] = ()
    precision: str = FULL
    in_blocks: bool = False
    in_parts: bool = False


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
    passes: forward passes for each video; in_full: of them, those that step caching is not to cut short; weights: model
    → GB on each device; stages in the order in which they run."""

    setting: Setting
    size: tuple[int, int]
    frames: int
    grid: LatentGrid
    text_tokens: int
    passes: int
    in_full: int
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

    def allows_transformer(self, *, during: str) -> bool:
        """Whether it may be there during a stage that does not need it, and the most that is needed stay; with
        offloading."""
        by_name = {stage.name: stage for stage in self.stages}
        return by_name[during].total + by_name[DENOISE].weights <= self.peak.total


def estimate(bundle: Bundle, setting: Setting) -> Estimate:
    """Traces each stage on shapes. Raises OsjaxError for a request that the bundle cannot draw."""
    first, roles = setting.requests[0], setting.roles
    vae, mmdit = (model_config(bundle.component(name)) for name in (roles.vae, roles.mmdit))
    parts = [shape_of(first, vae, mmdit.patch_size)]
    parts += [continued(parts[0], first, vae)] * first.extend
    components = dict.fromkeys((*roles.components, *setting.beside))
    parameters = {name: bundle.component(name).parameters for name in components}
    weights = {name: _weight_bytes(bundle.component(name), setting) / GB for name in components}
    plans = [_plan(setting, part, mmdit.guidance_embed) for part in parts]
    passes, reuse = [guidance.forward_passes(plan) for plan in plans], SPEEDS[first.speed]
    needs = _activations(bundle, setting, parts)
    stages, resident = [], list(setting.beside)
    for name, (model, activations) in needs.items():
        resident = [model] if setting.offload else [*dict.fromkeys([*resident, model])]
        held = sum(weights[each] for each in resident)
        in_blocks = setting.in_blocks and name == DENOISE
        stages.append(denoising(bundle, setting) if in_blocks else Stage(name, held, MARGIN * activations / GB))
    return Estimate(
        setting=setting,
        size=parts[0].size,
        frames=sum(part.kept.stop - part.kept.start for part in parts),
        grid=parts[0].grid,
        text_tokens=bundle.component("t5").max_length,
        passes=sum(passes),
        in_full=sum(passes if reuse is None else map(reuse.passes_in_full, plans)),
        parameters=parameters,
        weights=weights,
        stages=tuple(stages),
    )


def denoising(bundle: Bundle, setting: Setting) -> Stage:
    """The stage that the transformer is at work in, with offloading: told sooner than all of them.

    Raises OsjaxError for a request that the bundle cannot draw.
    """
    roles, component = setting.roles, bundle.component(setting.roles.mmdit)
    config = model_config(component)
    shape = shape_of(setting.requests[0], model_config(bundle.component(roles.vae)), config.patch_size)
    weights = (_block_weight_bytes if setting.in_blocks else _weight_bytes)(component, setting)
    return Stage(DENOISE, weights / GB, MARGIN * _denoising_bytes(bundle, setting, shape) / GB)


def _denoising_bytes(bundle: Bundle, setting: Setting, shape: Shape) -> int:
    component, length = bundle.component(setting.roles.mmdit), bundle.component("t5").max_length
    model = component.kind, model_config(component), setting.dtype
    cached = SPEEDS[setting.requests[0].speed] is not None
    means = setting.precision, setting.mesh, setting.attention, cached, setting.in_blocks or setting.in_parts
    return _denoise_bytes(*model, len(setting.requests), length, shape.grid, *means)


def _given_frames(shape: Shape) -> int:
    """Frames of each reference, 0 if there is none."""
    return shape.reference_frames if shape.kind.references else 0


def _plan(setting: Setting, shape: Shape, told: bool) -> tuple[guidance.GuidedStep, ...]:
    requests, options = setting.requests, sampling_options(setting.requests[0])
    return guidance.plan(
        options.branch_scales(told),
        options.steps,
        shape.grid.t,
        image_condition=shape.kind.is_image,
        same_text=all(prompt_used(request, setting.roles) == request.negative_prompt for request in requests),
        same_condition=not _given_frames(shape),
    )


def _activations(bundle: Bundle, setting: Setting, parts: Sequence[Shape]) -> dict[str, tuple[str, int]]:
    """Stage → (its model, bytes that it makes on each device), in order; references only where there are some.

    parts: of a video, which differ in their references only.
    """
    roles, shape, given = setting.roles, parts[0], max(map(_given_frames, parts))

    def model(name: str) -> tuple[str, Any, jnp.dtype]:
        component = bundle.component(name)
        return component.kind, model_config(component), setting.dtype

    count, length = len(setting.requests), bundle.component("t5").max_length
    found = {
        "text (T5)": ("t5", _text_bytes(*model("t5"), count, length)),
        "text (CLIP)": ("clip", _text_bytes(*model("clip"), count, bundle.component("clip").max_length)),
    }
    if given:
        found[REFERENCES] = roles.vae, _encode_bytes(*model(roles.vae), (given, *shape.size))
    found[DENOISE] = roles.mmdit, _denoising_bytes(bundle, setting, shape)
    found["decode (VAE)"] = roles.vae, _decode_bytes(*model(roles.vae), count, shape.grid)
    return found


# Each is kept: settings that are compared differ in few of their stages.
@functools.cache
def _model(kind: str, config: Any, dtype: jnp.dtype, precision: str = FULL) -> nnx.Module:
    return nnx.eval_shape(lambda: quantize(MODELS[kind][0](config, rngs=ModuleRngs(0), dtype=dtype), precision))


def _weight_bytes(component: Component, setting: Setting) -> int:
    if setting.precision == FULL or not issubclass(MODELS[component.kind][0], MMDiT):
        return component.parameters * np.dtype(setting.dtype).itemsize
    return tree_bytes(_model(component.kind, model_config(component), setting.dtype, setting.precision))


def _block_weight_bytes(component: Component, setting: Setting) -> int:
    """Of all but the blocks, and of as many of these as are there at once: at work, next, and on its way."""
    rest, double, single = jax.eval_shape(
        cut, _model(component.kind, model_config(component), setting.dtype, setting.precision)
    )
    return tree_bytes(rest) + 3 * max(map(tree_bytes, (*double[:1], *single[:1])))


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
    precision: str,
    mesh: MeshShape,
    attention: str,
    cached: bool,
    by_block: bool,
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
    if cached:
        kept = jax.eval_shape(lambda: nothing_kept(BRANCHES, rows, tokens, config.hidden_size, dtype))
        inputs += kept, f32(()), f32((rows, tokens))
    given = tree_bytes(inputs) // mesh.devices
    axes = dataclasses.asdict(mesh)
    where = Where(
        AbstractMesh(tuple(axes.values()), tuple(axes), axis_types=(AxisType.Auto,) * len(axes)),
        _traced_attention(attention),
        FOR_SAMPLING,
    )
    model, means = _model(kind, config, dtype, precision), {"sequence": sequence, "where": where}
    if not by_block:
        return given + peak_bytes(functools.partial(euler_step, **means), model, *inputs)
    streams = _Abstract((rows, tokens, config.hidden_size), dtype), _Abstract((rows, length, config.hidden_size), dtype)
    waiting = BRANCHES * tree_bytes(streams) * (3 if cached else 1) // mesh.devices
    return given + waiting + _block_bytes(model, streams, means)


def _block_bytes(model: MMDiT, streams: tuple[_Abstract, _Abstract], means: dict[str, Any]) -> int:
    """The most that a block by itself makes of the streams [B, N, F] and [B, L, F]."""
    _, (double, *_), (single, *_) = jax.eval_shape(cut, model)
    (rows, tokens, features), length = streams[0].shape, streams[1].shape[1]
    vec_bf = _Abstract((rows, features), streams[0].dtype)
    joint_bmf = _Abstract((rows, length + tokens, features), streams[0].dtype)

    def rope(count: int) -> Rope:
        return Rope(*[_Abstract((1, count, model.config.head_dim // 2), jnp.float32)] * 2)

    return max(
        peak_bytes(functools.partial(through_double, **means), double, *streams, vec_bf, rope(tokens)),
        peak_bytes(functools.partial(through_single, **means), single, joint_bmf, vec_bf, rope(length + tokens)),
    )


def _traced_attention(name: str) -> Attention:
    return {"xla": reference_attention, "fp8": _fused_in_8_bits}.get(name, _fused)


def _fused(q_bnhd: jax.Array, k_bmhd: jax.Array, v_bmhd: jax.Array) -> jax.Array:
    """Stands in for a fused kernel when traced: it reads three arrays and makes one, and is never run."""
    return jax.pure_callback(_never, _Abstract(q_bnhd.shape, q_bnhd.dtype), q_bnhd, k_bmhd, v_bmhd)


def _fused_in_8_bits(q_bnhd: jax.Array, k_bmhd: jax.Array, v_bmhd: jax.Array) -> jax.Array:
    """The same for one whose inputs are rounded first."""
    rounded = [x.astype(jnp.float8_e4m3fn) for x in (q_bnhd, k_bmhd, v_bmhd)]
    return jax.pure_callback(_never, _Abstract(q_bnhd.shape, q_bnhd.dtype), *rounded)


def _never(*arrays: Any) -> Any:
    raise AssertionError("a stand-in that is only traced was run")
