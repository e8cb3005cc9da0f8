"""What a block of the MMDiT does beside attention and norms: products with its weights, and what directly follows them.

`Operations` leaves all to XLA. `HopperOperations` does the same in one kernel each (`osjax/kernels/matmul_sm90.py`); it
has no gradient. Results are equal up to rounding: between a product and what follows it, kernels keep float32. Which
one is faster was measured (docs/performance.md, section Products).

B batch, M rows (tokens), F features, N outputs of a product, L layers of a stack, H heads, D head width.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from osjax.kernels.attention import HEAD_WIDTHS
from osjax.kernels.epilogues import HEAD, Added, Heads, Hidden, Scales
from osjax.kernels.matmul_sm90 import matmul
from osjax.kernels.matmul_tiles import Tile
from osjax.models.layers import in_range
from osjax.models.projections import Module, Projection, copied, put
from osjax.models.quantized import (
    MODULATION,
    QuantizedLinear,
    Rounded,
    peaks,
    rounded,
    rounded_by,
    rounded_side_by_side,
    scale_of,
)
from osjax.models.rope import Rope, rotate

if TYPE_CHECKING:
    from osjax.models.mmdit import QKV, MMDiTConfig

Carry = TypeVar("Carry")
Heads3 = tuple[jax.Array, jax.Array, jax.Array]
COLUMNS = Tile().columns
E4M3 = jnp.float8_e4m3fn
gelu = functools.partial(jax.nn.gelu, approximate=True)


@dataclasses.dataclass(frozen=True)
class Operations:
    """By XLA, on every device; differentiable. modulations_first: of all layers, before the first; a scan over layers
    would copy their weights out of the stack only to read them once. Not where weights are gathered layer by layer.
    in_place: whether a block's result may lie where its input was."""

    modulations_first: bool = False
    in_place: ClassVar[bool] = True

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

    def hidden(self, x_bmf: jax.Array, linear: Projection, beside: Sequence[jax.Array] = ()) -> jax.Array | Rounded:
        """GELU of a product: [B, M, F] → [B, M, N], for `added`. beside: [B, M, …], what `added` gets with it."""
        if not _rounds(linear):
            return gelu(linear(x_bmf))
        x = rounded(x_bmf, E4M3)
        scale_bm = _hidden_scale(x, linear, beside)
        return Rounded(rounded_by(gelu(linear.of_rounded(x, jnp.float32)), scale_bm, E4M3), scale_bm)

    def added(
        self,
        x_bmn: jax.Array,
        gate_bn: jax.Array,
        linear: Projection,
        inputs: Sequence[jax.Array | Rounded],
        first_row: int = 0,
    ) -> jax.Array:
        """x + gate · product, [B, M, N]. inputs: [B, M, F1], [B, M, F2], … side by side; of longer ones, M rows from
        `first_row` on. The last may be what `hidden` gave."""
        rows = [jax.tree.map(lambda each: each[:, first_row : first_row + x_bmn.shape[1]], each) for each in inputs]
        if _rounds(linear):
            values, scale_bm = rounded_side_by_side(rows, E4M3)
            product_bmn = linear.of_rounded(Rounded(_joined(values), scale_bm), x_bmn.dtype)
        else:
            product_bmn = linear(_joined(rows))
        return in_range(x_bmn + gate_bn[:, None] * product_bmn)


BY_XLA = Operations()
FOR_SAMPLING = Operations(modulations_first=True)


class Known(nnx.Module):
    """In place of a projection whose result is known: [B, N], or of a stack of them [L, B, N]."""

    def __init__(self, result: jax.Array):
        self.result = nnx.Variable(result)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.result[...]


@dataclasses.dataclass(frozen=True)
class HopperOperations(Operations):
    """All by kernels for Hopper GPUs, in bfloat16 or float16, or with weights in float8."""

    in_place: ClassVar[bool] = False  # `added` reads what is added to while it writes: XLA would have to copy it

    def heads(self, x_bmf: jax.Array, qkv: QKV, rope: Rope | None) -> Heads3:
        if rope is not None and rope.cos_bnd.shape[0] != 1:
            raise ValueError(f"the kernel rotates all rows of a batch alike, not by {rope.cos_bnd.shape[0]} tables")
        scales = jnp.stack([qkv.q_norm.scale[...], qkv.k_norm.scale[...]]).astype(jnp.float32)
        turn = None if rope is None else (rope.cos_bnd[0], rope.sin_bnd[0])
        after = Heads(scales, turn, qkv.q_norm.epsilon)
        parts = _product(qkv.lin, [x_bmf], x_bmf.dtype, after=after)
        return tuple(part.reshape(*part.shape[:2], -1, HEAD) for part in parts)

    def hidden(self, x_bmf: jax.Array, linear: Projection, beside: Sequence[jax.Array] = ()) -> jax.Array | Rounded:
        if not _rounds(linear):
            return _product(linear, [x_bmf], x_bmf.dtype, after=gelu)
        x = rounded(x_bmf, E4M3)
        scale_bm = _hidden_scale(x, linear, beside)
        return Rounded(_product(linear, [x], E4M3, after=Hidden(gelu, 1.0 / scale_bm)), scale_bm)

    def added(
        self,
        x_bmn: jax.Array,
        gate_bn: jax.Array,
        linear: Projection,
        inputs: Sequence[jax.Array | Rounded],
        first_row: int = 0,
    ) -> jax.Array:
        rows = {"first_row": first_row, "row_count": x_bmn.shape[1]}
        return _product(linear, inputs, x_bmn.dtype, after=Added(x_bmn, gate_bn), **rows)


BY_KERNELS = HopperOperations(modulations_first=True)


def operations_for(config: MMDiTConfig, attention: str, precision: str) -> Operations:
    """The fastest for sampling: in fp8 kernels, where attention is one of those and they know the model's sizes."""
    divides = config.head_dim == HEAD and not config.hidden_size % COLUMNS and not config.mlp_hidden % COLUMNS
    return BY_KERNELS if attention in HEAD_WIDTHS and divides and precision == "fp8" else FOR_SAMPLING


def modulated_first(blocks: Module, vec_bf: jax.Array) -> Module:
    """A copy of a stack of blocks in which what their modulations give for `vec` is known, for all layers."""
    done = copied(blocks)
    for name, linear in _projections(blocks):
        if f".{name}".endswith(MODULATION):
            y_lbn = jnp.einsum("bf,lfn->lbn", jax.nn.silu(vec_bf), linear.kernel[...])
            put(done, name, Known(y_lbn + linear.bias[...][:, None]))
    return done


def _product(
    linear: Projection | QuantizedLinear, inputs: Sequence[jax.Array | Rounded], out_dtype: jnp.dtype, **what: Any
) -> Any:
    kernel, bias = linear.kernel[...], linear.bias
    if isinstance(linear, QuantizedLinear):
        kernel = kernel.reshape(-1, kernel.shape[-1])
        inputs, rows_bm = rounded_side_by_side(inputs, E4M3)
        what["scales"] = Scales(rows_bm, linear.scale[...].reshape(-1))
        features = kernel.shape[0]
    else:
        kernel = kernel.reshape(kernel.shape[0], -1)
        features = kernel.shape[1]
    bias_n = jnp.zeros(features, jnp.float32) if bias is None else bias[...].reshape(-1)
    return matmul(inputs, kernel, bias_n, out_dtype=out_dtype, **what)


def _joined(parts: Sequence[jax.Array]) -> jax.Array:
    return parts[0] if len(parts) == 1 else jnp.concatenate(parts, axis=-1)


def _rounds(linear: Projection | QuantizedLinear) -> bool:
    return isinstance(linear, QuantizedLinear) and linear.rounds_inputs


def _hidden_scale(x: Rounded, linear: QuantizedLinear, beside: Sequence[jax.Array]) -> jax.Array:
    """By which GELU of the product is rounded, float32 [B, M]: from a bound that is known before the product, so that
    this need not be written in 16 bits and read twice more to be rounded. By how much it is too large costs no digits,
    e4m3 being a floating-point type, but for numbers below 2^-15 of it."""
    bound_bm = linear.bound(x)  # GELU makes nothing larger
    return scale_of(jnp.maximum(bound_bm, peaks(beside)) if beside else bound_bm, E4M3)


def _projections(model: nnx.Module) -> list[tuple[str, nnx.Module]]:
    """Those of 8 bits too, each with its name."""
    modules = [(".".join(map(str, path)), module) for path, module in nnx.iter_modules(model)]
    return [(name, module) for name, module in modules if isinstance(module, Projection | QuantizedLinear)]
