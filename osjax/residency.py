"""Which parts of a bundle are on the devices, and when.

A part is read from disk at its first use. With `offload` it leaves the devices when its stage ends and waits in host
memory, so that the largest part alone decides what fits; an MMDiT that is asked for in blocks never comes whole.
Weights never change: what waits there stays there, and leaving again is forgetting.

On GPUs an MMDiT is in parts, each layer's weights by themselves: a scan over the stack would copy them out of it first,
and takes longer to compile (docs/performance.md, section A forward pass).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from osjax import adapters, leaves
from osjax.adapters import Adapter
from osjax.bundle import Bundle, Component
from osjax.checkpoint import load_component, load_rows
from osjax.errors import OsjaxError
from osjax.kernels.convolution import choose_convolution
from osjax.models import lora
from osjax.models.autoencoder_2d import Autoencoder2D, Autoencoder2DConfig
from osjax.models.changes import Changes
from osjax.models.clip import CLIPText, CLIPTextConfig
from osjax.models.conv3d import convolved_by
from osjax.models.dc_ae import DCAE, DCAEConfig
from osjax.models.hunyuan_vae import HunyuanVAE, HunyuanVAEConfig
from osjax.models.mmdit import MMDiT, MMDiTConfig
from osjax.models.quantized import FULL, NAMES, checked, quantize
from osjax.models.rngs import ModuleRngs
from osjax.models.streamed import STACKS, Layers, StreamedMMDiT, cut, is_stacked
from osjax.models.t5 import T5Config, T5Encoder
from osjax.parallel.host_memory import to_devices, to_host
from osjax.parallel.specs import SPECS

Place = Callable[[Any], Any]  # arrays, or a pytree of them, to where they are to stay
MODELS: dict[str, tuple[type[nnx.Module], type]] = {
    "mmdit": (MMDiT, MMDiTConfig),
    "flux": (MMDiT, MMDiTConfig),
    "hunyuan_vae": (HunyuanVAE, HunyuanVAEConfig),
    "t5": (T5Encoder, T5Config),
    "clip": (CLIPText, CLIPTextConfig),
    "dc_ae": (DCAE, DCAEConfig),
    "autoencoder_2d": (Autoencoder2D, Autoencoder2DConfig),
}


def model_config(component: Component) -> Any:
    """The component's hyper-parameters as its model's config. Raises OsjaxError if they are not of that model."""
    if component.kind not in MODELS:
        raise OsjaxError(
            f"this osjax knows no model of kind {component.kind!r}: update osjax, or convert the model again"
        )
    config_class = MODELS[component.kind][1]
    fields = {field.name for field in dataclasses.fields(config_class)}
    unknown = sorted(set(component.config) - fields)
    if unknown:
        raise OsjaxError(
            f"{component.kind} has unknown options {', '.join(unknown)}: update osjax, or convert it again"
        )
    if component.precision not in NAMES:
        raise OsjaxError(f"this osjax knows no precision {component.precision!r}: update osjax, or convert it again")
    return config_class(**component.config)


def abstract_model(component: Component, dtype: jnp.dtype) -> nnx.Module:
    """The component's model with `jax.ShapeDtypeStruct` leaves: of that dtype, and of 8 bits where it is stored so.

    Raises OsjaxError as `model_config`.
    """
    model_class, _ = MODELS[component.kind]
    config = model_config(component)
    return nnx.eval_shape(lambda: quantize(model_class(config, rngs=ModuleRngs(0), dtype=dtype), component.precision))


def chosen_precision(bundle: Bundle, wanted: str | None, device: jax.Device) -> str:
    """The precision of a bundle's transformers on a device: the one that is wanted, else that of their weights.

    Raises OsjaxError for one that there is not, that the device cannot compute in, or that the weights do not have.
    """
    held = {each.precision for each in bundle.components.values()} - {FULL}
    precision = checked(wanted or min(held, default=FULL), device)
    if held - {precision}:
        raise OsjaxError(
            f"{bundle.path} holds weights in {', '.join(sorted(held))}, not {precision}: leave out --precision, or "
            "convert again without --quantize"
        )
    return precision


@dataclasses.dataclass(frozen=True)
class Source:
    """What models come from by their names, in the precision that they are to have. whole: onto every device of the
    mesh; in_layers: an MMDiT in parts, each of which goes through the function given, to where it is to stay."""

    whole: Callable[[str], nnx.Module]
    in_layers: Callable[[str, Place], Layers]


class Residency:
    """The models of one bundle on one mesh, in one dtype.

    modules: those that are there already; with offloading they are in host memory (`host_memory.to_host`). source: in
    place of the bundle's files. precision: of the transformers' blocks (`osjax.models.quantized`). in_parts: whether an
    MMDiT is a `StreamedMMDiT` where it is not asked for in blocks either; None: on GPUs. progress: bars on standard
    error while weights are read.
    """

    def __init__(
        self,
        bundle: Bundle,
        mesh: Mesh,
        dtype: jnp.dtype,
        *,
        offload: bool,
        modules: Mapping[str, nnx.Module] | None = None,
        source: Source | None = None,
        precision: str = FULL,
        in_parts: bool | None = None,
        progress: bool = False,
    ):
        self.bundle = bundle
        self._source = source or Source(self._read, self._read_layers)
        self._sharding = NamedSharding(mesh, SPECS.everywhere)
        self.dtype = dtype
        self.precision = precision
        self.in_parts = mesh.devices.flat[0].platform == "gpu" if in_parts is None else in_parts
        self._offload = offload
        self._progress = progress
        self._modules: dict[str, nnx.Module | StreamedMMDiT] = {} if offload else dict(modules or {})
        self._waiting: dict[str, nnx.Module | Layers] = dict(modules or {}) if offload else {}
        self._held: set[str] = set()
        self._last: set[str] = set()
        self._coming: dict[str, Future[nnx.Module | StreamedMMDiT | None]] = {}
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="weights")
        self._adapters: tuple[tuple[Adapter, float], ...] = ()

    @property
    def adapters(self) -> tuple[tuple[Adapter, float], ...]:
        """The LoRAs that the MMDiT has, and their weights."""
        return self._adapters

    def adapt(self, wanted: Sequence[tuple[Adapter, float]]) -> None:
        """Gives the MMDiT these LoRAs and no others. Raises OsjaxError for a LoRA of another model.

        It is read from disk again, because what merging rounds away would not come back by subtraction.
        """
        if wanted and self.bundle.component("mmdit").precision != FULL:
            raise OsjaxError(
                f"{self.bundle.path} holds weights in 8 bits, into which no LoRA can be merged: use a bundle in full, "
                f"with --precision {self.precision}"
            )
        for adapter, _ in wanted:
            adapters.check(adapter, self._stored("mmdit"))
        if tuple(wanted) != self._adapters:
            self._adapters = tuple(wanted)
            for places in (self._modules, self._waiting, self._coming):
                places.pop("mmdit", None)

    @property
    def offload(self) -> bool:
        """Whether parts that are not in use wait in host memory."""
        return self._offload

    @property
    def loaded(self) -> tuple[str, ...]:
        """Models that have been read; without offloading they stay on the devices."""
        return tuple(self._modules)

    def config(self, name: str) -> Any:
        """The frozen config of the model `name`."""
        return model_config(self.bundle.component(name))

    @contextlib.contextmanager
    def on_device(self, name: str, *, in_blocks: bool = False) -> Iterator[Any]:
        """The model `name`, its parameters on the mesh. With offload they are gone from the devices afterwards.

        Inside another such block of the same model it is there already, and stays until that one ends. in_blocks: an
        MMDiT as a `StreamedMMDiT` whose blocks stay in host memory, with offload only.
        """
        if name in self._held:
            yield self._modules[name]
            return
        coming = self._coming.pop(name, None)
        module = coming and coming.result()
        module = self._bring(name, in_blocks) if module is None else module
        self._modules[name] = module
        self._held.add(name)
        try:
            yield module
        finally:
            self._held.remove(name)
            if self._offload:
                self._leave(name)

    def expect(self, name: str, has_room: Callable[[], bool], *, in_blocks: bool = False) -> None:
        """Has the model brought by another thread while this one goes on, if it will have room beside what is at work.

        Without offloading it does nothing: there is nothing to gain, and room for all. What goes wrong is raised where
        the model is needed.
        """
        if self._offload and name not in self._held | self._coming.keys():
            self._coming[name] = self._thread.submit(lambda: self._bring(name, in_blocks) if has_room() else None)

    def last_use(self, *names: str) -> None:
        """These models are not needed after their next use: with offloading they leave without being kept in host
        memory, where locking pages takes a second for each GB. One that is asked for after all is read again."""
        self._last.update(names)

    def _bring(self, name: str, in_blocks: bool) -> nnx.Module | StreamedMMDiT:
        waiting, module = self._waiting.get(name), self._modules.get(name)
        if (not in_blocks and not self.in_parts) if isinstance(waiting, Layers) else in_blocks:
            waiting = None
            self._waiting.pop(name, None)  # in the other form; the host might not hold both
        bring = functools.partial(to_devices, sharding=self._sharding)
        if in_blocks:
            layers = waiting or self._source.in_layers(name, to_host)
            self._waiting[name] = layers
            return StreamedMMDiT(layers._replace(rest=bring(layers.rest)), bring)
        if waiting is not None:
            there = bring(waiting)
            return StreamedMMDiT(there) if isinstance(there, Layers) else there
        if module is not None:
            return module if isinstance(module, StreamedMMDiT) else jax.device_put(module, self._sharding)
        if self.in_parts and issubclass(MODELS[self.bundle.component(name).kind][0], MMDiT):
            return StreamedMMDiT(self._source.in_layers(name, bring))
        return self._load(name)

    def _leave(self, name: str) -> None:
        module = self._modules.pop(name)
        in_parts = isinstance(module, StreamedMMDiT)
        if name in self._last:
            self._last.remove(name)
            self._waiting.pop(name, None)
        elif name not in self._waiting:
            self._waiting[name] = to_host(module.layers if in_parts else module)
        if in_parts:
            module.forget()
        for array in jax.tree.leaves(module.resident if in_parts else module):
            array.delete()

    def _load(self, name: str) -> nnx.Module:
        module, devices = self._source.whole(name), self._sharding.mesh.devices
        if isinstance(module, HunyuanVAE) and devices.size == 1:  # over several, XLA partitions it, but no kernel
            module = convolved_by(module, choose_convolution(devices.flat[0], self.dtype))
        return module

    def _read(self, name: str) -> nnx.Module:
        stored = self._stored(name)
        how = {"stored": stored, "change": self._changes(name, stored), "progress": self._progress}
        return load_component(self.bundle.folder(name), self._made_of(stored), shardings=self._sharding, **how)

    def _read_layers(self, name: str, place: Place) -> Layers:
        stored = self._stored(name)
        targets, change = leaves.flatten(stored), self._changes(name, stored)
        stacked = set(filter(is_stacked, targets))
        arrays = load_rows(self.bundle.folder(name), targets, stacked, place, change, progress=self._progress)
        return _layers(self._made_of(stored), arrays)

    def _changes(self, name: str, stored: nnx.Module) -> Changes | None:
        if not isinstance(stored, MMDiT):
            return None
        used = self._adapters if name == "mmdit" else ()
        loaded = [(adapters.load(adapter, self._sharding), weight) for adapter, weight in used]
        return Changes.of(stored, lora.stack(loaded) if loaded else None, self.precision)

    def _stored(self, name: str) -> nnx.Module:
        """The model with the shapes that it has on disk."""
        return abstract_model(self.bundle.component(name), self.dtype)

    def _made_of(self, stored: nnx.Module) -> nnx.Module:
        """The model with the shapes that it has here."""
        if not isinstance(stored, MMDiT) or self.precision == FULL:
            return stored
        return jax.eval_shape(lambda model: quantize(model, self.precision), stored)


def _layers(model: MMDiT, arrays: Mapping[str, Any]) -> Layers:
    """A model in parts from its arrays by name, those of the stacks in lists of layers; `model` may be abstract."""
    abstract = jax.eval_shape(cut, model)
    own = {name: arrays[name] for name in leaves.flatten(abstract.rest)}
    double, single = (
        tuple(
            leaves.unflatten(block, {leaf: arrays[f"{stack}.{leaf}"][index] for leaf in leaves.flatten(block)})
            for index, block in enumerate(blocks)
        )
        for stack, blocks in zip(STACKS, abstract[1:], strict=True)
    )
    return Layers(leaves.unflatten(abstract.rest, own), double, single)
