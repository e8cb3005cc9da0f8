"""One suite for every attention this machine can run, against float64 NumPy; the Hopper kernel is lowered anywhere.

JAX_PLATFORMS=cuda python -m pytest tests/osjax/kernels    # on a GPU: cudnn and pallas too
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from osjax.errors import OsjaxError
from osjax.kernels.attention import APPROXIMATE, NAMES, choose_attention, why_not
from osjax.kernels.flash_sm90 import MEASURED_BEST, Blocks, flash_attention, flash_attention_lse

BF16, F16 = jnp.bfloat16, jnp.float16
# A 16-bit result, and weights rounded to 16 bits before the second product, are each off by up to half a unit in the
# last place: 2^-9 for bfloat16 (8 bits), 2^-12 for float16. Their errors are random; twice that bounds the norm.
TOLERANCE = {"bfloat16": 2**-8, "float16": 2**-11, "float32": 1e-5}
CASES = [  # batch, queries, keys, heads, width
    pytest.param((1, 1, 1, 1, 128), id="one of each"),
    pytest.param((2, 63, 100, 3, 64), id="less than a block"),
    pytest.param((1, 128, 192, 2, 128), id="exactly a block"),
    pytest.param((2, 257, 1000, 2, 128), id="a row and keys past the blocks"),
    pytest.param((1, 1030, 65, 1, 64), id="many queries, few keys"),
]


def runnable(dtype: jnp.dtype) -> list[str]:
    """The names that this machine's first device runs in that type; `xla` always is among them."""

    def runs(name: str) -> bool:
        try:
            choose_attention(name, jax.devices()[0], dtype)
        except OsjaxError:
            return False
        return True

    return [name for name in NAMES if name != "auto" and name not in APPROXIMATE and runs(name)]


IMPLEMENTATIONS = [(name, dtype) for dtype in (BF16, F16, jnp.float32) for name in runnable(dtype)]


def random_inputs(case: tuple[int, ...], dtype: jnp.dtype) -> list[jax.Array]:
    batch, queries, keys, heads, width = case
    rng = np.random.default_rng(sum(case))
    shapes = [(batch, tokens, heads, width) for tokens in (queries, keys, keys)]
    # Larger queries make the softmax choose: a wrong scale or maximum then shows.
    return [jnp.asarray(rng.normal(size=shape) * size, dtype) for shape, size in zip(shapes, (3, 1, 1), strict=True)]


def exact(q: jax.Array, k: jax.Array, v: jax.Array, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Attention and log-sum-exp in float64."""
    q, k, v = (np.asarray(x).astype(np.float64) for x in (q, k, v))
    scores = np.einsum("bnhd,bmhd->bhnm", q, k) * scale
    peak = scores.max(-1, keepdims=True)
    total = np.exp(scores - peak).sum(-1, keepdims=True)
    return np.einsum("bhnm,bmhd->bnhd", np.exp(scores - peak) / total, v), (peak + np.log(total))[..., 0]


def relative_error(got: jax.Array, want: np.ndarray) -> float:
    """‖got − want‖ / ‖want‖; NaN, which no comparison passes, where something was not written."""
    return float(np.linalg.norm(np.asarray(got).astype(np.float64) - want) / np.linalg.norm(want))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(
    ("name", "dtype"), IMPLEMENTATIONS, ids=[f"{n}-{jnp.dtype(d).name}" for n, d in IMPLEMENTATIONS]
)
def test_attention_equals_its_definition(name: str, dtype: jnp.dtype, case: tuple[int, ...]) -> None:
    chosen, attend = choose_attention(name, jax.devices()[0], dtype)
    assert chosen == name
    q, k, v = random_inputs(case, dtype)
    for scale in (None, 0.05):
        want, lse = exact(q, k, v, scale or case[-1] ** -0.5)
        # What the allocator hands out next was NaN just before, so that an output that is not written shows.
        jax.block_until_ready(jnp.full((4 * q.size,), jnp.nan, dtype))
        with jax.default_matmul_precision("highest"):  # XLA's float32 products on GPUs are TF32 otherwise
            out = jax.jit(functools.partial(attend, scale=scale))(q, k, v)
        assert (out.shape, out.dtype) == (q.shape, q.dtype)
        assert relative_error(out, want) < TOLERANCE[jnp.dtype(dtype).name]
        if name == "pallas":
            _, got = jax.jit(functools.partial(flash_attention_lse, scale=scale))(q, k, v)
            np.testing.assert_allclose(got, lse, atol=1e-4, rtol=1e-5)  # float32 sums, approximate log and exp2


def lower_for_cuda(call: Callable, *shapes: tuple[tuple[int, ...], jnp.dtype], sharding=None) -> jax.stages.Lowered:
    inputs = [jax.ShapeDtypeStruct(shape, dtype, sharding=sharding) for shape, dtype in shapes]
    return jax.jit(call).trace(*inputs).lower(lowering_platforms=("cuda",))


@pytest.mark.parametrize("case", [*CASES, pytest.param((1, 8828, 8828, 24, 128), id="256px video")])
@pytest.mark.parametrize("dtype", [BF16, F16], ids=["bf16", "f16"])
def test_the_hopper_kernel_lowers_for_cuda_anywhere(dtype: jnp.dtype, case: tuple[int, ...]) -> None:
    batch, queries, keys, heads, width = case
    q, k = ((batch, queries, heads, width), dtype), ((batch, keys, heads, width), dtype)
    lowered = lower_for_cuda(flash_attention_lse, q, k, k)
    assert "mosaic_gpu" in lowered.as_text()
    out, lse = lowered.out_info
    assert (out.shape, out.dtype) == q
    assert (lse.shape, lse.dtype) == ((batch, heads, queries), jnp.float32)


@pytest.mark.parametrize(
    "blocks", [Blocks(128, 64, 4), Blocks(128, 128, 3), Blocks(64, 192, 3), *MEASURED_BEST.values()]
)
def test_every_size_of_blocks_that_passes_its_checks_lowers(blocks: Blocks) -> None:
    shape = ((1, 300, 2, blocks.width), BF16)
    assert "mosaic_gpu" in lower_for_cuda(functools.partial(flash_attention, blocks=blocks), *[shape] * 3).as_text()


def test_the_hopper_kernel_lowers_inside_shard_map() -> None:
    mesh = jax.make_mesh((len(jax.devices()),), ("heads",))
    spec = PartitionSpec(None, None, "heads")
    shape = ((1, 100, 2 * mesh.size, 128), BF16)
    with jax.set_mesh(mesh):
        sharded = jax.shard_map(flash_attention, in_specs=(spec,) * 3, out_specs=spec)
        lowered = lower_for_cuda(sharded, *[shape] * 3, sharding=NamedSharding(mesh, spec))
    assert "mosaic_gpu" in lowered.as_text()


@pytest.mark.parametrize(
    ("width", "keys", "stages", "says"),
    [
        (96, 128, 2, "head widths 64 and 128"),
        (128, 100, 2, "multiple of 64"),
        (128, 128, 1, "at least 2"),
        (128, 192, 3, "shared memory"),  # 311 296 bytes
        (64, 256, 2, "registers"),  # 224 of a thread: was seen to spill
    ],
)
def test_blocks_refuse_what_the_gpu_cannot_hold(width: int, keys: int, stages: int, says: str) -> None:
    with pytest.raises(OsjaxError, match=says):
        Blocks(width, keys, stages)


@pytest.mark.parametrize(
    ("shapes", "dtypes", "options", "says"),
    [
        ([(1, 4, 2, 64), (1, 5, 2, 64), (1, 6, 2, 64)], [BF16] * 3, {}, "agree in B, H and D"),
        ([(1, 4, 2, 64), (1, 0, 2, 64), (1, 0, 2, 64)], [BF16] * 3, {}, "non-empty"),
        ([(1, 4, 2, 32)] * 3, [BF16] * 3, {}, "head widths 64 and 128"),
        ([(1, 4, 2, 64)] * 3, [BF16, F16, BF16], {}, "bfloat16, float16: cast"),
        ([(1, 4, 2, 64)] * 3, [jnp.float32] * 3, {}, "not float32: cast"),
        ([(1, 4, 2, 64)] * 3, [BF16] * 3, {"scale": -1.0}, "positive"),
        ([(1, 4, 2, 64)] * 3, [BF16] * 3, {"blocks": MEASURED_BEST[128]}, "another head width"),
    ],
)
def test_the_hopper_kernel_refuses_in_one_line(shapes: list, dtypes: list, options: dict, says: str) -> None:
    inputs = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    with pytest.raises(OsjaxError, match=says) as refused:
        jax.eval_shape(functools.partial(flash_attention, **options), *inputs)
    assert "\n" not in str(refused.value)


def gpu(capability: str) -> types.SimpleNamespace:
    return types.SimpleNamespace(platform="gpu", device_kind="a GPU", compute_capability=capability)


CPU = types.SimpleNamespace(platform="cpu", device_kind="cpu")


@pytest.mark.parametrize(
    ("name", "device", "dtype", "width", "chosen"),
    [
        ("auto", CPU, BF16, 128, "xla"),
        ("auto", gpu("9.0"), jnp.float32, 128, "xla"),
        ("auto", gpu("9.0"), BF16, 128, "pallas"),
        ("auto", gpu("9.0"), BF16, 64, "cudnn"),  # measured: no faster on long sequences
        ("auto", gpu("9.0"), BF16, None, "cudnn"),
        ("auto", gpu("8.0"), F16, 128, "cudnn"),
        ("auto", gpu("10.0"), BF16, 128, "cudnn"),
        ("xla", gpu("9.0"), BF16, 128, "xla"),
        ("pallas", gpu("9.0"), F16, 64, "pallas"),
        ("fp8", gpu("9.0"), F16, 128, "fp8"),
    ],
)
def test_auto_takes_the_fastest_and_a_name_is_taken_at_its_word(name, device, dtype, width, chosen) -> None:
    assert choose_attention(name, device, dtype, width)[0] == chosen


@pytest.mark.parametrize(
    ("name", "device", "dtype"),
    [("flash", CPU, BF16), ("cudnn", CPU, BF16), ("cudnn", gpu("9.0"), jnp.float32), ("pallas", CPU, BF16),
     ("pallas", gpu("8.0"), BF16), ("pallas", gpu("10.0"), BF16), ("pallas", gpu("9.0"), ml_dtypes.float8_e4m3fn),
     ("fp8", CPU, BF16), ("fp8", gpu("8.9"), BF16), ("fp8", gpu("9.0"), jnp.float32)],
)  # fmt: skip
def test_a_name_that_cannot_run_here_is_an_error(name, device, dtype) -> None:
    with pytest.raises(OsjaxError, match="use "):
        choose_attention(name, device, dtype)


def test_training_takes_what_has_a_gradient() -> None:
    assert choose_attention("auto", gpu("9.0"), BF16, 128, gradient=True)[0] == "cudnn"
    with pytest.raises(OsjaxError, match="attention pallas has no gradient: train with --attention auto"):
        choose_attention("pallas", gpu("9.0"), BF16, 128, gradient=True)


def test_the_reason_is_told_where_there_is_one() -> None:
    for name, device, dtype, width in (
        ("xla", CPU, F16, 7),
        ("cudnn", gpu("8.0"), F16, 96),
        ("pallas", gpu("9.0"), BF16, 64),
    ):
        assert why_not(name, device, dtype, width) is None
    assert "needs an NVIDIA GPU and bf16 or fp16, not cpu" in why_not("cudnn", CPU, BF16)
    assert "needs a Hopper GPU" in why_not("pallas", gpu("8.0"), BF16)
    assert why_not("pallas", gpu("9.0"), BF16, 96) == "knows heads of width 64 and 128, not 96"
    assert why_not("pallas", gpu("9.0"), BF16, gradient=True) == "has no gradient"
    assert why_not("fp8", gpu("9.0"), BF16, 64) == "knows heads of width 128, not 64"
