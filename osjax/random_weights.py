"""Models with random weights, drawn where they are to lie: for measuring without a checkpoint."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding

from osjax.bundle import Bundle, Component
from osjax.models.clip import CLIPTextConfig
from osjax.models.hunyuan_vae import HunyuanVAEConfig
from osjax.models.mmdit import DoubleBlock, MMDiT, MMDiTConfig, SingleBlock
from osjax.models.quantized import FULL
from osjax.models.rngs import ModuleRngs
from osjax.models.streamed import Layers, cut
from osjax.models.t5 import T5Config
from osjax.parallel.host_memory import to_host
from osjax.parallel.specs import SPECS
from osjax.residency import MODELS, Residency, Source, abstract_model, model_config

# Component → kind, config, tokens that a text encoder is given; the sizes of Open-Sora 2.0.
PUBLISHED = {
    "t5": ("t5", T5Config(), 512),
    "clip": ("clip", CLIPTextConfig(), 77),
    "mmdit": ("mmdit", MMDiTConfig(), None),
    "vae": ("hunyuan_vae", HunyuanVAEConfig(), None),
}


def bundle_of(models: Mapping[str, tuple[str, Any, int | None]]) -> Bundle:
    """A bundle that has no files; models: as in PUBLISHED."""
    components = {}
    for name, (kind, config, length) in models.items():
        component = Component(kind, dataclasses.asdict(config), "bfloat16", 0, 0, name, None, length)
        count = sum(leaf.size for leaf in jax.tree.leaves(abstract_model(component, jnp.bfloat16)))
        components[name] = dataclasses.replace(component, parameters=count, bytes=2 * count)
    return Bundle(Path("random weights"), "", components, {}, {}, "")


def draw(component: Component, mesh: Mesh, dtype: jnp.dtype) -> nnx.Module:
    """The component's model, whole on every device of the mesh, LeCun normal from seed 0."""
    config, everywhere = model_config(component), NamedSharding(mesh, SPECS.everywhere)
    make = lambda: MODELS[component.kind][0](config, rngs=ModuleRngs(0), dtype=dtype)  # noqa: E731
    return jax.block_until_ready(jax.jit(make, out_shardings=everywhere)())


def draw_layers(component: Component, mesh: Mesh, dtype: jnp.dtype) -> Layers:
    """The component's MMDiT in parts, in host memory, never whole; other numbers than `draw` gives."""
    config, everywhere = model_config(component), NamedSharding(mesh, SPECS.everywhere)

    @functools.partial(jax.jit, static_argnums=0, out_shardings=everywhere)
    def block(make: type[nnx.Module], key: jax.Array) -> nnx.Module:
        return make(config, rngs=ModuleRngs(key), dtype=dtype)

    def stack(make: type[nnx.Module], count: int) -> tuple[nnx.Module, ...]:
        return tuple(to_host(block(make, jax.random.key(seed))) for seed in range(count))

    rest = jax.jit(lambda: cut(MMDiT(config, rngs=ModuleRngs(0), dtype=dtype)).rest, out_shardings=everywhere)()
    return Layers(to_host(rest), stack(DoubleBlock, config.depth), stack(SingleBlock, config.depth_single_blocks))


def residency(bundle: Bundle, mesh: Mesh, dtype: jnp.dtype, *, offload: bool, precision: str = FULL) -> Residency:
    """The models of a bundle, whatever weights it has, each drawn when it is first needed."""
    source = Source(
        lambda name: draw(bundle.component(name), mesh, dtype),
        lambda name: draw_layers(bundle.component(name), mesh, dtype),
    )
    return Residency(bundle, mesh, dtype, offload=offload, source=source, precision=precision)
