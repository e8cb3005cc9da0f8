"""The Hopper convolution: lowered anywhere, and run against XLA's on a Hopper GPU or in Pallas' interpreter of GPUs.

JAX_PLATFORMS=cuda python -m pytest tests/osjax/kernels    # on a GPU
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from osjax.errors import OsjaxError
from osjax.kernels import hopper as kernels_hopper
from osjax.kernels.conv_sm90 import conv3d
from osjax.kernels.conv_tiles import Tiles, default_tiles
from tests.osjax.kernels.hopper import hopper, interpreted

BF16, F16 = jnp.bfloat16, jnp.float16
# Sums are float32, so what is off is the rounding of the result to 16 bits: at most half a unit in the last place, 2^-9
# for bfloat16 (8 bits) and 2^-12 for float16. A tenth more is for the sums.
TOLERANCE = {"bfloat16": 1.1 * 2**-9, "float16": 1.1 * 2**-12}
HALVES, BY_FRAMES = Tiles(3, 8, 16, 128, 7, 5), Tiles(4, 8, 8, 128, 12, 6)


@dataclasses.dataclass(frozen=True)
class Case:
    out: tuple[int, int, int, int, int]
    channels: int
    kernel: tuple[int, int, int]
    bias: bool = True
    residual: bool = False
    tiles: Tiles | None = None
    dtype: jnp.dtype = BF16

    def shapes(self) -> list[jax.ShapeDtypeStruct | None]:
        batch, *thw, outs = self.out
        size = (out + part - 1 for out, part in zip(thw, self.kernel, strict=True))
        return [
            jax.ShapeDtypeStruct((batch, *size, self.channels), self.dtype),
            jax.ShapeDtypeStruct((*self.kernel, self.channels, outs), self.dtype),
            jax.ShapeDtypeStruct((outs,), jnp.float32) if self.bias else None,
            jax.ShapeDtypeStruct(self.out, self.dtype) if self.residual else None,
        ]

    def inputs(self) -> list[jax.Array | None]:
        rng = np.random.default_rng(sum(self.out))
        return [x and jnp.asarray(rng.normal(size=x.shape), x.dtype) for x in self.shapes()]


SMALL = [
    pytest.param(Case((1, 1, 5, 5, 3), 16, (1, 2, 2)), id="first and last layer's channels, one frame"),
    pytest.param(Case((2, 4, 3, 20, 8), 72, (2, 1, 2), residual=True, dtype=F16), id="two batches, two boxes"),
    pytest.param(Case((1, 3, 9, 5, 136), 8, (3, 1, 1), False, True, BY_FRAMES), id="consumers split frames"),
    pytest.param(Case((1, 5, 2, 3, 130), 12, (3, 2, 1), tiles=HALVES), id="channels that are not multiples of 8"),
    pytest.param(Case((1, 1, 5, 9, 128), 16, (1, 2, 2)), id="default tiles, one frame"),
    pytest.param(Case((1, 5, 3, 9, 128), 8, (2, 2, 1)), id="default tiles, more frames than one"),
]
LARGE = [
    pytest.param(Case((1, 33, 32, 32, 512), 512, (3, 3, 3), residual=True), id="512 channels"),
    pytest.param(Case((1, 129, 256, 256, 3), 128, (3, 3, 3)), id="last layer"),
    pytest.param(Case((1, 65, 129, 129, 1024), 256, (2, 2, 2), tiles=Tiles(6, 4, 16, 128, 14, 5)), id="2 x 2 x 2"),
    pytest.param(Case((2, 1, 33, 17, 512), 256, (1, 3, 3), tiles=Tiles(2, 8, 8, 256, 8, 3)), id="256 columns"),
]


@pytest.mark.parametrize("case", [*SMALL, *(LARGE if hopper() else [])])
def test_the_convolution_equals_that_of_xla(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    x, kernel, bias, residual = case.inputs()
    with contextlib.nullcontext() if hopper() else interpreted(monkeypatch):
        if not hopper():
            monkeypatch.setattr(kernels_hopper, "H100_MULTIPROCESSORS", 2)  # fewer than tiles
        got = jax.jit(functools.partial(conv3d, tiles=case.tiles))(x, kernel, bias, residual)
    assert (got.shape, got.dtype) == (case.out, case.dtype)
    want = jax.lax.conv_general_dilated(
        x.astype(jnp.float32), kernel.astype(jnp.float32), (1, 1, 1), "VALID",
        dimension_numbers=("NDHWC", "DHWIO", "NDHWC"), precision="highest",
    )  # fmt: skip
    want = want + sum(extra.astype(jnp.float32) for extra in (bias, residual) if extra is not None)
    error = jnp.linalg.norm((got - want).ravel()) / jnp.linalg.norm(want.ravel())
    assert error < TOLERANCE[jnp.dtype(case.dtype).name]  # not so if anything is NaN


def lower_for_cuda(case: Case) -> jax.stages.Lowered:
    call = jax.jit(functools.partial(conv3d, tiles=case.tiles))
    return call.trace(*case.shapes()).lower(lowering_platforms=("cuda",))


@pytest.mark.parametrize("case", [*SMALL, *LARGE])
def test_the_convolution_lowers_for_cuda_anywhere(case: Case) -> None:
    lowered = lower_for_cuda(case)
    assert "mosaic_gpu" in lowered.as_text()
    assert (lowered.out_info.shape, lowered.out_info.dtype) == (case.out, case.dtype)


@pytest.mark.parametrize("frames", [1, 2, 3, 129])
@pytest.mark.parametrize("channels", [3, 64, 128, 1024])
def test_the_default_tiles_pass_their_checks(frames: int, channels: int) -> None:
    tiles = default_tiles(frames, channels)
    assert tiles.frames <= frames + 1
    assert tiles.columns <= max(channels, 64)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"width": 8}, "64 pixels and even frames"),  # 64 pixels, three frames
        ({"height": 1, "width": 128}, "an even height"),
        ({"width": 32}, "64 pixels and even frames"),
        ({"columns": 96}, "64, 128 or 256"),
        ({"frame_slots": 5}, "6 frame slots or more"),
        ({"weight_slots": 1}, "2 for weights"),
        ({"weight_slots": 6}, "247808 bytes of shared memory"),
        ({"frames": 4, "frame_slots": 8, "weight_slots": 2}, "256 registers"),
    ],
)
def test_tiles_refuse_what_the_gpu_cannot_hold(changes: dict, says: str) -> None:
    with pytest.raises(OsjaxError, match=says):
        dataclasses.replace(HALVES, **changes)


@pytest.mark.parametrize(
    ("shapes", "dtypes", "says"),
    [
        ([(1, 3, 3, 3, 8), (3, 3, 3, 16, 8)], [BF16] * 2, "agree in C"),
        ([(3, 3, 3, 8), (3, 3, 3, 8, 8)], [BF16] * 2, "takes .B, T, H, W, C. and"),
        ([(1, 2, 3, 3, 8), (3, 3, 3, 8, 8)], [BF16] * 2, "pad the input"),
        ([(1, 3, 3, 3, 8), (3, 3, 3, 8, 8), (4,)], [BF16] * 3, r"of shape \(8,\)"),
        ([(1, 3, 3, 3, 8), (3, 3, 3, 8, 8), (8,), (1, 3, 3, 3, 8)], [BF16] * 4, r"of shape \(1, 1, 1, 1, 8\)"),
        ([(1, 3, 3, 3, 8), (3, 3, 3, 8, 8)], [BF16, F16], "bfloat16, float16: cast"),
        ([(1, 3, 3, 3, 8), (3, 3, 3, 8, 8)], [jnp.float32] * 2, "not float32: cast"),
    ],
)
def test_the_convolution_refuses_in_one_line(shapes: list, dtypes: list, says: str) -> None:
    inputs = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
    with pytest.raises(OsjaxError, match=says) as refused:
        jax.eval_shape(conv3d, *inputs)
    assert "\n" not in str(refused.value)
