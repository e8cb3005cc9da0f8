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

from osjax import leaves
from osjax.bundle import Bundle, Component
from osjax.models.clip import CLIPTextConfig
from osjax.models.hunyuan_vae import HunyuanVAEConfig
from osjax.models.mmdit import MMDiT, MMDiTConfig
from osjax.models.quantized import FULL
from osjax.models.rngs import ModuleRngs
from osjax.models.streamed import Layers, cut, is_stacked
from osjax.models.t5 import T5Config
from osjax.parallel.specs import SPECS
from osjax.residency import MODELS, Place, Residency, Source, abstract_model, model_config

LEVEL = 40.0  # deviation of numbers of 8 bits, whose range is 127 or 448
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
    """The component's model, whole on every device of the mesh: LeCun normal from seed 0; in 8 bits by `_by_leaf`."""
    everywhere = NamedSharding(mesh, SPECS.everywhere)
    if component.precision != FULL:
        return _by_leaf(abstract_model(component, dtype), everywhere)
    config = model_config(component)
    make = lambda: MODELS[component.kind][0](config, rngs=ModuleRngs(0), dtype=dtype)  # noqa: E731
    return jax.block_until_ready(jax.jit(make, out_shardings=everywhere)())


def draw_layers(component: Component, mesh: Mesh, dtype: jnp.dtype, place: Place) -> Layers:
    """The component's MMDiT in parts, each drawn as in `_by_leaf` on every device of the mesh and placed from there."""
    everywhere = NamedSharding(mesh, SPECS.everywhere)
    rest, double, single = jax.eval_shape(cut, abstract_model(component, dtype))
    draw = lambda part, seed=0: place(_by_leaf(part, everywhere, seed))  # noqa: E731
    return Layers(
        draw(rest), *(tuple(draw(block, seed) for seed, block in enumerate(each)) for each in (double, single))
    )


def _by_leaf(abstract: nnx.Module, sharding: NamedSharding, seed: int = 0) -> nnx.Module:
    """Leaf by leaf, so that nothing is there twice: kernels of mean square 1 / inputs, biases 0, scales of norms 1."""
    arrays, drawn = leaves.flatten(abstract), {}
    for number, (name, leaf) in enumerate(sorted(arrays.items())):
        projection, _, parameter = name.rpartition(".")
        kernel = arrays.get(f"{projection}.kernel")
        in_8_bits = kernel is not None and kernel.dtype.itemsize == 1
        if parameter == "kernel":
            inputs = leaf.shape[-1] if in_8_bits else leaf.shape[is_stacked(name)]
            mean, deviation = 0.0, LEVEL if in_8_bits else inputs**-0.5
        else:
            scale = kernel.shape[-1] ** -0.5 / LEVEL if in_8_bits else 1.0
            mean, deviation = {"bias": 0.0, "scale": scale}[parameter], 0.0
        key = jax.random.fold_in(jax.random.key(seed), number)
        drawn[name] = _normal(key, mean, leaf.shape, leaf.dtype, deviation, sharding)
    return jax.block_until_ready(leaves.unflatten(abstract, drawn))


@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5))  # one compilation serves the leaf of every layer
def _normal(
    key: jax.Array, mean: float, shape: tuple[int, ...], dtype: jnp.dtype, deviation: float, sharding: NamedSharding
) -> jax.Array:
    """Within three deviations of the mean, computed in bfloat16; the mean alone if there is no deviation."""
    if deviation:
        x = mean + jnp.clip(deviation * jax.random.normal(key, shape, jnp.bfloat16), -3 * deviation, 3 * deviation)
    else:
        x = jnp.full(shape, mean)
    return jax.lax.with_sharding_constraint(x.astype(dtype), sharding)


def residency(bundle: Bundle, mesh: Mesh, dtype: jnp.dtype, *, offload: bool, precision: str = FULL) -> Residency:
    """The models of a bundle, whatever weights it has, each drawn when it is first needed."""

    def component(name: str) -> Component:
        found = bundle.component(name)
        of_blocks = issubclass(MODELS[found.kind][0], MMDiT)
        return dataclasses.replace(found, precision=precision) if of_blocks else found

    source = Source(
        lambda name: draw(component(name), mesh, dtype),
        lambda name, place: draw_layers(component(name), mesh, dtype, place),
    )
    return Residency(bundle, mesh, dtype, offload=offload, source=source, precision=precision)
