"""Low-rank adapters: W + scale · A·B in place of a projection W (LoRA, Hu et al. 2021, section 4.1).

An adapter is a pytree of its own, so that it alone can be trained, averaged and saved. It meets a model in two ways:
`attach` puts it beside the frozen projections, `merge` adds it into their weights.

L layers of a stacked projection (other projections lack the axis), F input features, R rank, O output axes: one of
`nnx.Linear`, three [3, H, D] of the queries, keys and values.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from osjax.errors import OsjaxError
from osjax.models.projections import Module, Projection, at, copied, outputs, projections, put


class Factors(NamedTuple):
    """What one projection is adapted by: `a` [(L,) F, R] and `b` [(L,) R, O…]."""

    a: Any
    b: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LoRA:
    """factors: name of a projection (its nnx path joined with dots) → its factors; scale: alpha / rank."""

    factors: dict[str, Factors]
    scale: float = dataclasses.field(metadata={"static": True})

    @property
    def arrays(self) -> dict[str, Any]:
        """The factors under flat names: `double_blocks.img.proj.a` and `.b`."""
        return {
            f"{name}.{part}": array for name, pair in self.factors.items() for part, array in pair._asdict().items()
        }

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, Any], scale: float) -> LoRA:
        """The inverse of `arrays`. Raises KeyError where A comes without B."""
        names = [name.removesuffix(".a") for name in arrays if name.endswith(".a")]
        return cls({name: Factors(arrays[f"{name}.a"], arrays[f"{name}.b"]) for name in names}, scale)


class LoRALinear(nnx.Module):
    """A projection and, beside it, the way through a bottleneck: base(x) + scale · (x·A)·B, in x's dtype."""

    def __init__(self, base: nnx.Module, factors: Factors, scale: float):
        self.base = base
        self.a = nnx.Param(factors.a)
        self.b = nnx.Param(factors.b)
        self.scale = scale

    def __call__(self, x: jax.Array) -> jax.Array:
        a, b = (factor[...].astype(x.dtype) for factor in (self.a, self.b))
        return self.base(x) + self.scale * jnp.tensordot(jnp.tensordot(x, a, 1), b, 1)

    @property
    def kernel(self) -> nnx.Param:
        """The frozen weight, which tells the dtype of the computation."""
        return self.base.kernel


def init(model: nnx.Module, rank: int, alpha: float, targets: Sequence[str], key: jax.Array) -> LoRA:
    """A float32 adapter that changes nothing yet: A uniform within ±1/√F, as peft draws it, and B zero.

    model: abstract or not. targets: the last names of projections, such as `proj` or `qkv.lin`.
    Raises OsjaxError for a rank below 1, and for a target that is no projection of the model.
    """
    if rank < 1:
        raise OsjaxError(f"lora.rank is {rank}: give at least 1")
    known = projections(model)
    chosen = {target: [name for name in known if f".{name}".endswith(f".{target}")] for target in targets}
    absent = [target for target, names in chosen.items() if not names]
    if absent or not targets:
        raise OsjaxError(
            f"lora.targets names no projection of the model ({', '.join(absent) or 'it is empty'}): "
            f"choose last names of {', '.join(known)}"
        )
    names = sorted({name for names in chosen.values() for name in names})
    factors = {}
    for name, each in zip(names, jax.random.split(key, len(names)), strict=True):
        shapes = factor_shapes(known[name], rank)
        bound = 1 / math.sqrt(shapes.a[-2])
        a = jax.random.uniform(each, shapes.a, jnp.float32, -bound, bound)
        factors[name] = Factors(a, jnp.zeros(shapes.b, jnp.float32))
    return LoRA(factors, alpha / rank)


def attach(model: Module, lora: LoRA) -> Module:
    """A copy of the model that shares its arrays and runs the adapter beside them; `model` stays as it is.

    Plain array code: to be called inside `jax.grad`, where gradients reach A and B only through it.
    Raises OsjaxError as `check` does.
    """
    check(model, lora)
    adapted = copied(model)
    for name, factors in lora.factors.items():
        put(adapted, name, LoRALinear(at(adapted, name), factors, lora.scale))
    return adapted


def detach(model: Module) -> Module:
    """The inverse of `attach`: a copy without adapters, its arrays those of the original."""
    plain = copied(model)
    for path, module in list(nnx.iter_modules(plain)):
        if isinstance(module, LoRALinear):
            put(plain, ".".join(map(str, path)), module.base)
    return plain


def merge(model: Module, lora: LoRA) -> Module:
    """A copy of the model with W + scale · A·B, summed in float32 and rounded to W's dtype.

    Layer by layer and, under `jax.jit` with the model donated, in place. Raises OsjaxError as `check` does.
    """
    check(model, lora)
    other = copied(model)
    for name, factors in lora.factors.items():
        projection = at(other, name)
        kernel = merged(projection.kernel.get_value(), factors, lora.scale)
        projection.kernel = projection.kernel.replace(kernel)
    return other


def stack(loras: Iterable[tuple[LoRA, float]]) -> LoRA:
    """Several adapters with their weights as one, of scale 1: Σ weight · scale · A·B over ranks put side by side."""
    parts: dict[str, list[Factors]] = {}
    for lora, weight in loras:
        for name, (a, b) in lora.factors.items():
            parts.setdefault(name, []).append(Factors(a, weight * lora.scale * b))
    return LoRA({name: _side_by_side(each) for name, each in parts.items()}, 1.0)


def check(model: nnx.Module, lora: LoRA) -> None:
    """Raises one OsjaxError that lists all factors that no projection of the model takes; either may be abstract."""
    known = projections(model)
    unknown = [name for name in lora.factors if name not in known]
    misfits = [
        f"{name} is {_sizes(known[name].kernel.shape)}, the LoRA's are {_sizes(a.shape)} and {_sizes(b.shape)}"
        for name, (a, b) in lora.factors.items()
        if name in known and (a.shape, b.shape) != factor_shapes(known[name], a.shape[-1])
    ]
    if unknown or misfits:
        raise OsjaxError(
            f"LoRA and model do not match (unknown: {', '.join(unknown) or 'none'}; wrong shapes: "
            f"{', '.join(misfits) or 'none'}): choose a LoRA that was made for this model"
        )


def factor_shapes(projection: Projection, rank: int) -> Factors:
    """The shapes of A and B for one projection, stacked over layers or not."""
    shape, axes = projection.kernel.shape, outputs(projection)
    layers, inputs = shape[: -axes - 1], shape[-axes - 1]
    return Factors((*layers, inputs, rank), (*layers, rank, *shape[-axes:]))


def merged(kernel: jax.Array, factors: Factors, scale: float) -> jax.Array:
    """A kernel [(L,) F, O…] with scale · A·B of its factors, as in `merge`."""

    def layer(kernel: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        product = jnp.tensordot(a.astype(jnp.float32), b.astype(jnp.float32), 1, precision="highest")
        return (kernel.astype(jnp.float32) + scale * product).astype(kernel.dtype)

    def add_to(i: jax.Array, kernel: jax.Array) -> jax.Array:
        return kernel.at[i].set(layer(kernel[i], a[i], b[i]))

    a, b = map(jnp.asarray, factors)
    return jax.lax.fori_loop(0, len(kernel), add_to, kernel) if a.ndim == 3 else layer(kernel, a, b)


def _side_by_side(parts: Sequence[Factors]) -> Factors:
    rank_of_b = parts[0].a.ndim - 2  # behind the layers, if there are any
    return Factors(
        jnp.concatenate([part.a for part in parts], axis=-1),
        jnp.concatenate([part.b for part in parts], axis=rank_of_b),
    )


def _sizes(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))
