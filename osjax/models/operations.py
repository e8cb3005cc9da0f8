"""What a block of the MMDiT does beside attention and norms: products with its weights, and what directly follows them.

`Operations` leaves all to XLA. `HopperOperations` does the same in one kernel each (`osjax/kernels/matmul_sm90.py`), in
which a block's weights are read where they lie in the stack of all layers, `HopperHeads` only what is followed by norms
and RoPE; they have no gradient. Results are equal up to rounding: between a product and what follows it, kernels keep
float32. Which one is faster was measured (docs/performance.md, section Products).

B batch, M rows (tokens), F features, N outputs of a product, L layers of a stack, H heads, D head width.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from osjax.kernels.attention import HEAD_WIDTHS
from osjax.kernels.epilogues import HEAD, Added, Heads, Scales
from osjax.kernels.matmul_sm90 import matmul
from osjax.kernels.matmul_tiles import Tile
from osjax.models.layers import in_range
from osjax.models.projections import Module, Projection, at, copied, put
from osjax.models.quantized import FULL, MODULATION, QuantizedLinear, rounded_side_by_side
from osjax.models.rope import Rope, rotate

if TYPE_CHECKING:
    from osjax.models.mmdit import QKV, MMDiTConfig

Carry = TypeVar("Carry")
Heads3 = tuple[jax.Array, jax.Array, jax.Array]
COLUMNS = Tile().columns
gelu = functools.partial(jax.nn.gelu, approximate=True)


@dataclasses.dataclass(frozen=True)
class Operations:
    """By XLA, on every device; differentiable. modulations_first: of all layers, before the first; a scan over layers
    would copy their weights out of the stack only to read them once. Not where weights are gathered layer by layer."""

    modulations_first: bool = False

    def scan(
        self, step: Callable[[Carry, Any], tuple[Carry, None]], carry: Carry, blocks: nnx.Module, vec_bf: jax.Array
    ) -> Carry:
        """`step(carry, block)` for one block of the stack after the other. vec: what all of them are modulated by."""
        blocks = modulated_first(blocks, vec_bf) if self.modulations_first else blocks
        return jax.lax.scan(step, carry, blocks)[0]

    def heads(self, x_bmf: jax.Array, qkv: QKV, rope: Rope | None) -> Heads3:
        """Queries and keys, normalised and rotated, and values: each [B, M, H, D]."""
        q, k, v = qkv(x_bmf)
        return (q, k, v) if rope is None else (rotate(q, rope), rotate(k, rope), v)

    def hidden(self, x_bmf: jax.Array, linear: Projection) -> jax.Array:
        """GELU of a product: [B, M, F] → [B, M, N]."""
        return gelu(linear(x_bmf))

    def added(
        self,
        x_bmn: jax.Array,
        gate_bn: jax.Array,
        linear: Projection,
        inputs: Sequence[jax.Array],
        first_row: int = 0,
    ) -> jax.Array:
        """x + gate · product, [B, M, N]. inputs: [B, M, F1], [B, M, F2], … side by side; of longer ones, M rows from
        `first_row` on."""
        rows = [each[:, first_row : first_row + x_bmn.shape[1]] for each in inputs]
        product_bmn = linear(rows[0] if len(rows) == 1 else jnp.concatenate(rows, axis=-1))
        return in_range(x_bmn + gate_bn[:, None] * product_bmn)


BY_XLA = Operations()
FOR_SAMPLING = Operations(modulations_first=True)


class LayeredLinear(nnx.Module):
    """A projection that is one layer of a stack. kernel: [L, F, N…] of all layers, or of 8 bits [L, N…, F] with a scale
    [N…] of this one; layer: int32 []; bias: [N…] of this one."""

    def __init__(
        self, kernel: jax.Array | None, layer: jax.Array | None, bias: jax.Array | None, scale: jax.Array | None
    ):
        self.kernel = None if kernel is None else nnx.Param(kernel)
        self.layer = None if layer is None else nnx.Variable(layer)
        self.bias = None if bias is None else nnx.Param(bias)
        self.scale = None if scale is None else nnx.Param(scale)


class Known(nnx.Module):
    """In place of a projection whose result is known: [B, N], or of a stack of them [L, B, N]."""

    def __init__(self, result: jax.Array):
        self.result = nnx.Variable(result)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.result[...]


@dataclasses.dataclass(frozen=True)
class HopperHeads(Operations):
    """By a kernel for Hopper GPUs what makes queries, keys and values; the rest by XLA."""

    def heads(self, x_bmf: jax.Array, qkv: QKV, rope: Rope | None) -> Heads3:
        scales = jnp.stack([qkv.q_norm.scale[...], qkv.k_norm.scale[...]]).astype(jnp.float32)
        turn = None if rope is None else (rope.cos_bnd[0], rope.sin_bnd[0])
        after = Heads(scales, turn, qkv.q_norm.epsilon)
        return tuple(part.reshape(*part.shape[:2], -1, HEAD) for part in _product(qkv.lin, [x_bmf], after=after))


@dataclasses.dataclass(frozen=True)
class HopperOperations(HopperHeads):
    """All by kernels for Hopper GPUs, in bfloat16 or float16, or with weights in float8."""

    def scan(
        self, step: Callable[[Carry, Any], tuple[Carry, None]], carry: Carry, blocks: nnx.Module, vec_bf: jax.Array
    ) -> Carry:
        rest = modulated_first(blocks, vec_bf)
        kernels = {}
        for name, linear in _projections(rest):
            kernels[name] = linear.kernel[...]
            put(rest, name, LayeredLinear(None, None, _value(linear.bias), _scale(linear)))

        def one(carry: Carry, layer: tuple[jax.Array, nnx.Module]) -> tuple[Carry, None]:
            index, block = layer
            for name, kernel in kernels.items():
                own = at(block, name)
                put(block, name, LayeredLinear(kernel, index, _value(own.bias), _value(own.scale)))
            return step(carry, block)

        count = next(iter(kernels.values())).shape[0]
        return jax.lax.scan(one, carry, (jnp.arange(count, dtype=jnp.int32), rest))[0]

    def hidden(self, x_bmf: jax.Array, linear: Projection) -> jax.Array:
        return _product(linear, [x_bmf], after=gelu)

    def added(
        self,
        x_bmn: jax.Array,
        gate_bn: jax.Array,
        linear: Projection,
        inputs: Sequence[jax.Array],
        first_row: int = 0,
    ) -> jax.Array:
        return _product(linear, inputs, after=Added(x_bmn, gate_bn), first_row=first_row, row_count=x_bmn.shape[1])


HEADS_BY_KERNEL = HopperHeads(modulations_first=True)
BY_KERNELS = HopperOperations()
KERNELS: dict[str, Operations] = {FULL: HEADS_BY_KERNEL, "fp8": BY_KERNELS}  # precision → what is fastest on Hopper


def operations_for(config: MMDiTConfig, attention: str, precision: str) -> Operations:
    """The fastest for sampling: with kernels, where attention is one of those and they know the model's sizes."""
    divides = config.head_dim == HEAD and not config.hidden_size % COLUMNS and not config.mlp_hidden % COLUMNS
    return KERNELS.get(precision, FOR_SAMPLING) if attention in HEAD_WIDTHS and divides else FOR_SAMPLING


def modulated_first(blocks: Module, vec_bf: jax.Array) -> Module:
    """A copy of a stack of blocks in which what their modulations give for `vec` is known, for all layers."""
    done = copied(blocks)
    for name, linear in _projections(blocks):
        if f".{name}".endswith(MODULATION):
            y_lbn = jnp.einsum("bf,lfn->lbn", jax.nn.silu(vec_bf), linear.kernel[...])
            put(done, name, Known(y_lbn + linear.bias[...][:, None]))
    return done


def _product(linear: nnx.Module, inputs: Sequence[jax.Array], **what: Any) -> Any:
    if isinstance(linear, LayeredLinear):
        kernel, layer = linear.kernel[...], linear.layer[...]
    else:
        kernel, layer = linear.kernel[...][None], jnp.int32(0)
    scale, bias, scales = _scale(linear), _value(linear.bias), None
    if scale is None:
        kernel = kernel.reshape(*kernel.shape[:2], -1)
        features = kernel.shape[2]
    else:
        kernel = kernel.reshape(kernel.shape[0], -1, kernel.shape[-1])
        features = kernel.shape[1]
        what["out_dtype"] = inputs[0].dtype
        inputs, rows_bm = rounded_side_by_side(inputs, kernel.dtype)
        scales = Scales(rows_bm, scale.reshape(-1))
    bias_n = jnp.zeros(features, jnp.float32) if bias is None else bias.reshape(-1)
    return matmul(inputs, kernel, layer, bias_n, scales=scales, **what)


def _projections(model: nnx.Module) -> list[tuple[str, nnx.Module]]:
    """Those of 8 bits too, each with its name."""
    modules = [(".".join(map(str, path)), module) for path, module in nnx.iter_modules(model)]
    return [(name, module) for name, module in modules if isinstance(module, Projection | QuantizedLinear)]


def _scale(linear: nnx.Module) -> jax.Array | None:
    return _value(getattr(linear, "scale", None))


def _value(parameter: nnx.Param | None) -> jax.Array | None:
    return None if parameter is None else parameter[...]
