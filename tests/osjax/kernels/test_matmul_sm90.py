"""Products for Hopper: lowered anywhere, and run against XLA's on a Hopper GPU or in Pallas' interpreter of GPUs.

JAX_PLATFORMS=cuda python -m pytest tests/osjax/kernels    # on a GPU
"""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from osjax.errors import OsjaxError
from osjax.kernels import hopper as kernels_hopper
from osjax.kernels.epilogues import Added, Heads, Hidden, Scales
from osjax.kernels.matmul_sm90 import matmul
from osjax.kernels.matmul_tiles import Tile, measured_best
from osjax.models.quantized import Rounded, rounded
from tests.osjax.kernels.hopper import hopper, interpreted

BF16, F16, F32, FP8 = jnp.bfloat16, jnp.float16, jnp.float32, jnp.float8_e4m3fn
# Sums are float32, so what is off is the rounding of the result: at most half a unit in the last place, 2^-9 for
# bfloat16 (8 bits) and 2^-12 for float16. A tenth more is for the sums and for approximate functions.
TOLERANCE = {"bfloat16": 1.1 * 2**-9, "float16": 1.1 * 2**-12}
gelu = functools.partial(jax.nn.gelu, approximate=True)
B, M, K, N = 2, 300, 128, 768  # rows that fill no tile
EVERY = ["plain", "rows", "gelu", "added", "heads", "turned", "fp8"]


def drawn(seed: int, *shape: int, dtype: jnp.dtype = F32, scale: float = 1.0) -> jax.Array:
    return (scale * jax.random.normal(jax.random.key(seed), shape)).astype(dtype)


def normed(y_bmhd: jax.Array, scale_d: jax.Array) -> jax.Array:
    return y_bmhd * jax.lax.rsqrt((y_bmhd**2).mean(-1, keepdims=True) + 1e-6) * scale_d


def turned(y_bmhd: jax.Array, cos_md: jax.Array, sin_md: jax.Array) -> jax.Array:
    first, second = jnp.split(y_bmhd, 2, axis=-1)
    cos, sin = cos_md[:, None], sin_md[:, None]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], -1)


def widened(x: Rounded) -> jax.Array:
    return x.values.astype(F32) * x.scale[..., None]


def case(name: str, dtype: jnp.dtype) -> tuple[Any, list[jax.Array]]:
    """(a call of the kernel, what it should return in float32)."""
    x, more = drawn(0, B, M, K, dtype=dtype), drawn(1, B, M, 64, dtype=dtype)
    w, bias = drawn(2, K + 64, N, dtype=dtype, scale=(K + 64) ** -0.5), drawn(3, N)
    wide = functools.partial(jnp.matmul, precision="highest")
    y = wide(x.astype(F32), w[:K].astype(F32)) + bias
    call = functools.partial(matmul, [x], w[:K], bias)
    if name == "plain":
        return call, [y]
    if name == "rows":
        return functools.partial(call, first_row=70, row_count=130), [y[:, 70:200]]
    if name == "gelu":
        return functools.partial(call, after=gelu), [gelu(y)]
    if name == "added":
        old, gate = drawn(4, B, M, N, dtype=dtype), drawn(5, B, N)
        both = wide(jnp.concatenate([x, more], -1).astype(F32), w.astype(F32)) + bias
        call = functools.partial(matmul, [x, more], w, bias, after=Added(old, gate))
        return call, [old.astype(F32) + gate[:, None] * both]
    if name == "fp8":
        rows, columns = rounded(x, FP8), rounded(w[:K].T, FP8)
        call = functools.partial(
            matmul, [rows.values], columns.values, bias, scales=Scales(rows.scale, columns.scale), out_dtype=dtype
        )
        return call, [wide(widened(rows), widened(columns).T) + bias]
    scale, angles = drawn(6, 2, 128), drawn(7, M, 64)
    turn = (jnp.cos(angles), jnp.sin(angles)) if name == "turned" else None
    q, k, v = jnp.moveaxis(y.reshape(B, M, 3, N // 384, 128), 2, 0)
    q, k = normed(q, scale[0]), normed(k, scale[1])
    if turn:
        q, k = turned(q, *turn), turned(k, *turn)
    return functools.partial(call, after=Heads(scale, turn)), [part.reshape(B, M, -1) for part in (q, k, v)]


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("name", EVERY)
def test_products_equal_those_of_xla(name: str, dtype: jnp.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    call, want = case(name, dtype)
    with contextlib.nullcontext() if hopper() else interpreted(monkeypatch):
        if not hopper():
            monkeypatch.setattr(kernels_hopper, "H100_MULTIPROCESSORS", 4)  # fewer than tiles
        got = jax.jit(call)()
    for one, other in zip(jax.tree.leaves(got), want, strict=True):
        assert (one.shape, one.dtype) == (other.shape, dtype)
        error = jnp.linalg.norm((one - other).ravel()) / jnp.linalg.norm(other.ravel())
        assert error < TOLERANCE[jnp.dtype(dtype).name]  # not so if anything is NaN


@pytest.mark.parametrize("name", EVERY)
def test_products_lower_for_cuda_anywhere(name: str) -> None:
    lowered = jax.jit(case(name, BF16)[0]).trace().lower(lowering_platforms=("cuda",))
    assert "mosaic_gpu" in lowered.as_text()


def hidden() -> tuple[Any, jax.Array, jax.Array]:
    """(a call whose result is rounded to 8 bits, what it should return in float32, the scale of its rows)."""
    x, columns = rounded(drawn(0, B, M, K), FP8), rounded(drawn(2, N, K, scale=K**-0.5), FP8)
    bias = drawn(3, N)
    want = gelu(jnp.matmul(widened(x), widened(columns).T, precision="highest") + bias)
    scale_bm = jnp.abs(want).max(axis=-1) / 448 * jnp.exp2(jnp.arange(M) % 9)  # too large by 2^8 at most
    after = Hidden(gelu, 1.0 / scale_bm)
    scales = Scales(x.scale, columns.scale)
    call = functools.partial(matmul, [x.values], columns.values, bias, scales=scales, after=after)
    return call, want, scale_bm


def test_a_hidden_layer_is_rounded_to_8_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    call, want, scale_bm = hidden()
    with contextlib.nullcontext() if hopper() else interpreted(monkeypatch):
        if not hopper():
            monkeypatch.setattr(kernels_hopper, "H100_MULTIPROCESSORS", 4)
        got = jax.jit(call)()
    assert (got.shape, got.dtype) == ((B, M, N), FP8)
    scaled = want / scale_bm[..., None]
    # Half a unit in the last place of 4 bits, 2^-4; of numbers below 2^-6 the unit is 2^-9. On a GPU besides: GELU is
    # half its input, 8 at most here, times 1 + tanh, which is off by 2^-11 (PTX ISA, tanh.approx), and the tensor cores
    # keep 14 bits of a sum, whose parts come to 8.
    rounding = jnp.maximum(jnp.abs(scaled) * 2**-4, 2**-10)
    allowed = 1.01 * rounding + (4 * 2**-11 + 8 * 2**-13) / scale_bm[..., None]
    assert (jnp.abs(got.astype(F32) - scaled) <= allowed).all()


def test_a_hidden_layer_in_8_bits_lowers_for_cuda_anywhere() -> None:
    lowered = jax.jit(hidden()[0]).trace().lower(lowering_platforms=("cuda",))
    assert lowered.out_info.dtype == FP8


def test_the_published_sizes_lower() -> None:
    def run(x: jax.Array, kernel: jax.Array, bias: jax.Array, scale: jax.Array, table: jax.Array) -> Any:
        return matmul([x], kernel, bias, after=Heads(scale, (table, table)))

    shapes = [((1, 76_544, 3072), BF16), ((3072, 9216), BF16), ((9216,), F32), ((2, 128), F32), ((76_544, 64), F32)]
    traced = jax.jit(run).trace(*(jax.ShapeDtypeStruct(*each) for each in shapes))
    out = traced.lower(lowering_platforms=("cuda",)).out_info
    assert [part.shape for part in out] == [(1, 76_544, 3072)] * 3


def test_float16_ends_at_its_largest_number(monkeypatch: pytest.MonkeyPatch) -> None:
    x, w = jnp.full((1, 64, 64), 200.0, F16), jnp.full((64, 128), 200.0, F16)
    with contextlib.nullcontext() if hopper() else interpreted(monkeypatch):
        got = matmul([x], w, jnp.zeros(128))
    assert (np.asarray(got) == np.finfo(np.float16).max).all()


@pytest.mark.parametrize("rows", [1, 512, 1024, 8316, 76_544])
@pytest.mark.parametrize("features", [3072, 9216, 12_288])
def test_the_measured_tiles_divide_the_published_sizes(rows: int, features: int) -> None:
    assert features % (3 * measured_best(rows, features).columns) == 0


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rows": 96}, "multiples of 64"),
        ({"columns": 100}, "multiples of 64"),
        ({"stages": 1}, "2 stages or more"),
        ({"stages": 5}, "bytes of shared memory"),
    ],
)
def test_tiles_refuse_what_the_gpu_cannot_hold(changes: dict[str, int], says: str) -> None:
    with pytest.raises(OsjaxError, match=says):
        Tile(**changes)


@pytest.mark.parametrize(("width", "features"), [(100, 256), (128, 200), (64, 256)])
def test_sizes_that_do_not_divide_are_refused(width: int, features: int) -> None:
    x, w = jnp.zeros((1, 8, width), BF16), jnp.zeros((128, features), BF16)
    with pytest.raises(OsjaxError, match=r"cannot be multiplied by Tile.*use XLA"):
        matmul([x], w, jnp.zeros(features))
