"""Flash attention in 8 bits: run on a Hopper GPU, else in Pallas' interpreter where this jax has it; lowered anywhere.

XLA_FLAGS=--xla_force_host_platform_device_count=8 python -m pytest tests/osjax/kernels/test_flash_fp8_sm90.py
"""

from __future__ import annotations

import contextlib
import functools
import math
import types
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from osjax.errors import OsjaxError
from osjax.kernels import flash_fp8_sm90
from osjax.kernels.flash_fp8_operands import E4M3, GROUP, key_of, lane_order, rounded
from osjax.kernels.flash_fp8_sm90 import MEASURED_BEST, Blocks8, flash_attention_fp8
from tests.osjax.kernels.hopper import hopper, interpreted

BF16, F16 = jnp.bfloat16, jnp.float16
# Root mean square of half a unit in the last place of 4 bits: 2^-4 / sqrt(3) for mantissas of 1, 0.74 of it on average.
ROUNDING = 2**-4 / math.sqrt(3) * 0.74
# Of scores whose spread is 1, q and k are rounded, then weights and values: five hundredths; a fifth more for chance.
TOLERANCE = 1.2 * ROUNDING * math.sqrt(4)
CASES = [  # batch, queries, keys, heads, keys of a block
    pytest.param((1, 1, 1, 1, 192), id="one of each"),
    pytest.param((2, 63, 100, 2, 64), id="two blocks, the last in part"),
    pytest.param((1, 128, 192, 1, 192), id="exactly a block"),
    pytest.param((1, 130, 400, 2, 128), id="a few rows past the tile"),
]


def random_inputs(case: tuple[int, ...], dtype: jnp.dtype = BF16) -> list[jax.Array]:
    batch, queries, keys, heads, _ = case
    rng = np.random.default_rng(sum(case))
    return [jnp.asarray(rng.normal(size=(batch, n, heads, 128)), dtype) for n in (queries, keys, keys)]


def exact(q: Any, k: Any, v: Any, scale: float = 128**-0.5) -> np.ndarray:
    q, k, v = (np.asarray(x).astype(np.float64) for x in (q, k, v))
    scores = np.einsum("bnhd,bmhd->bhnm", q, k) * scale
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhnm,bmhd->bnhd", weights / weights.sum(-1, keepdims=True), v)


def emulated(q: jax.Array, k: jax.Array, v: jax.Array, blocks: Blocks8) -> np.ndarray:
    """The kernel's own rounding, in one block of all keys; under jit, as one bit of a scale may turn a tie."""
    given = jax.jit(functools.partial(rounded, scale=128**-0.5, block_keys=blocks.keys))(q, k, v)
    keys = np.arange(given.k_bmhd.shape[1])
    true = np.isin(keys, [i for i in keys if key_of(i) < k.shape[1]])
    q8, k8, v8 = (np.asarray(x).astype(np.float32) for x in given[:3])
    log2_scale, v_scale = (np.asarray(x)[:, :, None, None] for x in given[3:])
    scores = np.where(true, np.einsum("bnhd,bmhd->bhnm", q8, k8) * log2_scale, -np.inf)
    weights = np.exp2(scores - scores.max(-1, keepdims=True) + 8)
    weights8 = np.asarray(jnp.asarray(weights).astype(E4M3)).astype(np.float32)
    found = np.einsum("bhnm,bhdm->bhnd", in_order(weights8), v8) / weights.sum(-1, keepdims=True) * v_scale
    return found.transpose(0, 2, 1, 3)[:, : q.shape[1]]


def in_order(weights: Any) -> Any:
    """What `as_left_operand` does to columns."""
    *rows, columns = weights.shape
    return weights.reshape(*rows, columns // GROUP, 2, 4, 2).swapaxes(-3, -2).reshape(weights.shape)


def relative_error(got: Any, want: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(got).astype(np.float64) - want) / np.linalg.norm(want))


@contextlib.contextmanager
def running(patch: pytest.MonkeyPatch) -> Iterator[None]:
    if hopper():
        yield
        return
    with interpreted(patch):
        patch.setattr(flash_fp8_sm90, "as_left_operand", lambda weights: in_order(weights).astype(E4M3))
        interpret_registers(patch)
        yield


def interpret_registers(patch: pytest.MonkeyPatch) -> None:
    """Teaches the interpreter two things it does not know: left operands, and sums that are set, in registers."""
    from jax._src.pallas.mosaic_gpu import primitives
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, jaxpr_interpret

    (interpreter,) = {c for c in vars(jaxpr_interpret).values() if hasattr(c, "_interpret_wgmma_ref_p")}
    multiply_shared = interpreter._interpret_wgmma_ref_p
    known = types.SimpleNamespace(**vars(primitives))
    known.inline_mgpu_p = primitives.wgmma_accumulator_store_p  # takes its place, as none is left

    @gpu_callbacks.fail_on_exception
    def change(*, token, mesh_location, thread, acc, value, b=None, source_info) -> Any:
        info = gpu_callbacks.memory.GPULoggingInfo(mesh_location, thread, source_info)
        memory = gpu_callbacks._get_shared_memory()

        def place(key: Any, transforms: tuple = ()) -> tuple:
            key, transforms = gpu_callbacks.HostAllocationKey.from_array(key), jax.tree.map(int, transforms)
            return key, memory.access(key, gpu_callbacks._remove_noop_transforms(transforms)), thread

        value = np.asarray(value).astype(np.float32)
        if b is not None:
            right, _, _ = memory.get_buffer_content(*place(*b), logging_info=info)
            old, _, _ = memory.get_buffer_content(*place(acc), logging_info=info)
            value = old + value @ right.astype(np.float32)
        key, where, _ = place(acc)
        memory.store_buffer_content(key, where, value, thread, logging_info=info)
        return token

    def called(self: Any, eqn: Any, token: jax.Array, **what: Any) -> jax.Array:
        where = {"mesh_location": self.mesh_location, "thread": self.thread}
        call = functools.partial(change, source_info=eqn.source_info)
        return jaxpr_interpret.callback.io_callback(call, gpu_callbacks.TOKEN_SHAPE_DTYPE, token=token, **where, **what)

    def multiply(self: Any, eqn: Any, token: jax.Array, get_invals: Any) -> tuple:
        if not isinstance(eqn.invars[1].aval, jax.core.ShapedArray):
            return multiply_shared(self, eqn, token, get_invals)
        acc, a, b, *leaves = get_invals()
        b = jaxpr_interpret.resolve_ref(eqn.invars[2].aval, b, eqn.params["b_transforms_tree"].unflatten(leaves))
        return called(self, eqn, token, acc=acc, value=a, b=b), []

    def store(self: Any, eqn: Any, token: jax.Array, get_invals: Any) -> tuple:
        acc, value = get_invals()
        return called(self, eqn, token, acc=acc, value=value), acc

    patch.setattr(interpreter, "_interpret_wgmma_ref_p", multiply)
    patch.setattr(interpreter, "_interpret_inline_mgpu_p", store)
    patch.setattr(jaxpr_interpret, "gpu_primitives", known)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "f16"])
def test_attention_is_exact_within_its_rounding(case: tuple, dtype: jnp.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = random_inputs(case, dtype)
    blocks = Blocks8(case[-1])
    with running(monkeypatch):
        for scale in (None, 0.05):
            jax.block_until_ready(jnp.full((4 * q.size,), jnp.nan, dtype))  # what is not written shows
            out = jax.jit(functools.partial(flash_attention_fp8, scale=scale, blocks=blocks))(q, k, v)
            assert (out.shape, out.dtype) == (q.shape, q.dtype)
            assert relative_error(out, exact(q, k, v, scale or 128**-0.5)) < TOLERANCE
            if scale is None and k.shape[1] <= blocks.keys:
                assert relative_error(out, emulated(q, k, v, blocks)) < ROUNDING  # ties may fall either way


def test_zeros_and_outliers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A channel of the keys that is large and the same for all does not cost precision; nothing becomes NaN."""
    q, k, v = random_inputs((1, 64, 64, 2, 64))
    with running(monkeypatch):
        attend = jax.jit(functools.partial(flash_attention_fp8, blocks=Blocks8(64)))
        offset = attend(q, k.at[..., 5].add(64.0), v)
        assert relative_error(offset, exact(q, k.at[..., 5].add(64.0), v)) < 2 * TOLERANCE  # bfloat16 of 64 is coarse
        zero = jnp.zeros_like(q)
        np.testing.assert_array_equal(attend(q, k, zero), 0)
        assert relative_error(attend(zero, zero, v), exact(zero, zero, v)) < TOLERANCE


@pytest.mark.parametrize("keys", [1, 100, 192, 1000])
def test_the_rounding_alone_is_within_the_tolerance(keys: int) -> None:
    q, k, v = random_inputs((2, 200, keys, 2, 0))
    assert relative_error(emulated(q, k, v, MEASURED_BEST), exact(q, k, v)) < TOLERANCE


def test_keys_and_weights_are_put_in_order_alike() -> None:
    # PTX ISA, wgmma: lane l of a row's four holds these of each 16 sums, and is to hold 4l to 4l + 3 of 8-bit operands.
    held = [[2 * lane, 2 * lane + 1, 8 + 2 * lane, 9 + 2 * lane] for lane in range(4)]
    np.testing.assert_array_equal(in_order(np.arange(GROUP)), np.ravel(held))
    keys = jnp.arange(64)
    columns = lane_order(keys[None, :, None, None])[0, :, 0, 0]
    np.testing.assert_array_equal(columns, key_of(keys))
    np.testing.assert_array_equal(in_order(columns), keys)


def test_what_the_kernel_gets_is_padded_with_zeros() -> None:
    q, k, v = random_inputs((1, 100, 50, 2, 64))
    given = rounded(q, k, v, 1.0, block_keys=64)
    assert [x.shape for x in given] == [(1, 128, 2, 128), (1, 64, 2, 128), (1, 2, 128, 64), (1, 2), (1, 2)]
    assert [x.dtype.name for x in given] == ["float8_e4m3fn"] * 3 + ["float32"] * 2
    back = given.v_bhdm.astype(jnp.float32) * given.v_scale_bh[:, :, None, None]
    assert relative_error(back.transpose(0, 3, 1, 2)[:, :50], np.asarray(v, np.float64)) < 1.2 * ROUNDING
    assert not np.any(given.v_bhdm[..., 50:].astype(jnp.float32))


def lowered_text(shapes: list[tuple[int, ...]], dtype: jnp.dtype = BF16, **options: Any) -> str:
    inputs = [jax.ShapeDtypeStruct(shape, dtype) for shape in shapes]
    call = jax.jit(functools.partial(flash_attention_fp8, **options))
    lowered = call.trace(*inputs).lower(lowering_platforms=("cuda",))
    assert (lowered.out_info.shape, lowered.out_info.dtype) == (shapes[0], dtype)
    return lowered.as_text()


@pytest.mark.parametrize("case", [*CASES, pytest.param((1, 8828, 8828, 24, 192), id="256px video")])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "f16"])
def test_the_kernel_lowers_for_cuda_anywhere(dtype: jnp.dtype, case: tuple[int, ...]) -> None:
    batch, queries, keys, heads, _ = case
    assert "mosaic_gpu" in lowered_text([(batch, n, heads, 128) for n in (queries, keys, keys)], dtype)


@pytest.mark.parametrize("blocks", [Blocks8(32), Blocks8(128, 4), Blocks8(160, 3), Blocks8(192, 3), Blocks8(224)])
def test_every_size_of_blocks_that_passes_its_checks_lowers(blocks: Blocks8) -> None:
    assert "mosaic_gpu" in lowered_text([(1, 300, 2, 128)] * 3, blocks=blocks)


@pytest.mark.parametrize(
    ("keys", "stages", "says"),
    [(100, 2, "32, 64"), (0, 2, "32, 64"), (128, 1, "at least 2"), (128, 6, "shared memory"), (256, 2, "registers")],
)
def test_blocks_refuse_what_the_gpu_cannot_hold(keys: int, stages: int, says: str) -> None:
    with pytest.raises(OsjaxError, match=says):
        Blocks8(keys, stages)


@pytest.mark.parametrize(
    ("shapes", "dtypes", "scale", "says"),
    [
        ([(1, 4, 2, 128), (1, 5, 2, 128), (1, 6, 2, 128)], [BF16] * 3, None, "agree in B, H and D"),
        ([(1, 4, 2, 128), (1, 0, 2, 128), (1, 0, 2, 128)], [BF16] * 3, None, "non-empty"),
        ([(1, 4, 2, 64)] * 3, [BF16] * 3, None, "head width 128, not 64"),
        ([(1, 4, 2, 128)] * 3, [BF16, F16, BF16], None, "bfloat16, float16: cast"),
        ([(1, 4, 2, 128)] * 3, [jnp.float32] * 3, None, "not float32: cast"),
        ([(1, 4, 2, 128)] * 3, [BF16] * 3, 0.0, "positive"),
        ([(1, 4, 2, 128)] * 3, [BF16] * 3, -1.0, "positive"),
    ],
)
def test_the_kernel_refuses_in_one_line(shapes: list, dtypes: list, scale: float | None, says: str) -> None:
    inputs = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    with pytest.raises(OsjaxError, match=says) as refused:
        jax.eval_shape(functools.partial(flash_attention_fp8, scale=scale), *inputs)
    assert "\n" not in str(refused.value)
