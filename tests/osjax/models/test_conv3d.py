"""Convolution, norm and upsampling over videos, against sums written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from osjax.models.conv3d import CausalConv3D, group_norm, upsample_nearest_causal

TOLERANCE = 1e-5  # float32 sums of at most a few hundred terms of order one


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize(("size", "stride"), [(3, (1, 1, 1)), (3, (2, 2, 2)), (3, (1, 2, 2)), (5, (2, 1, 1))])
def test_causal_conv_is_a_sum_over_clamped_past_positions(size, stride):
    conv = CausalConv3D(2, 3, size, stride, rngs=nnx.Rngs(0))
    x = random(1, 5, 6, 7, 2)
    actual = np.asarray(conv(x))

    expected = np.zeros((1, *(-(-n // s) for n, s in zip(x.shape[1:4], stride, strict=True)), 3))
    kernel = np.asarray(conv.kernel[...], np.float64)
    back = (size - 1, size // 2, size // 2)
    for at in np.ndindex(expected.shape[1:4]):
        for tap in np.ndindex(size, size, size):
            source = [i * s + k - b for i, s, k, b in zip(at, stride, tap, back, strict=True)]
            source = tuple(np.clip(source, 0, np.array(x.shape[1:4]) - 1))
            expected[0][at] += x[0][source] @ kernel[tap]
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, atol=TOLERANCE)


@pytest.mark.parametrize("stride", [(1, 1, 1), (2, 2, 2)])
def test_a_picture_is_the_first_frame_of_any_video_that_starts_with_it(stride):
    conv = CausalConv3D(2, 3, 3, stride, rngs=nnx.Rngs(0))
    x = random(2, 5, 6, 7, 2)
    np.testing.assert_allclose(conv(x[:, :1]), conv(x)[:, :1], atol=TOLERANCE)


def test_upsampling_repeats_but_keeps_the_first_frame_single():
    x = random(2, 3, 2, 2, 1)
    up = np.asarray(upsample_nearest_causal(x, (2, 2, 1)))
    assert up.shape == (2, 5, 4, 2, 1)
    for frame, source in enumerate([0, 1, 1, 2, 2]):
        for row in range(4):
            np.testing.assert_array_equal(up[:, frame, row], x[:, source, row // 2])


def test_upsampling_by_one_changes_nothing():
    x = random(1, 3, 2, 2, 1)
    np.testing.assert_array_equal(upsample_nearest_causal(x, (1, 1, 1)), x)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_group_norm_keeps_small_deviations_of_large_values(dtype):
    """Values 256 and 258 are exact in bfloat16; their variance of 1 is lost unless it is summed in float32, centred."""
    signs = np.sign(random(1, 4, 8, 8, 6))
    norm = group_norm(6, 2, rngs=nnx.Rngs(0), dtype=dtype)
    y = jax.jit(lambda m, x: m(x))(norm, jnp.asarray(257 + signs, dtype))
    assert y.dtype == dtype
    per_group = signs.reshape(1, 4, 8, 8, 2, 3)
    mean = per_group.mean(axis=(1, 2, 3, 5), keepdims=True)
    expected = ((per_group - mean) / np.sqrt(1 - mean**2)).reshape(signs.shape)
    np.testing.assert_allclose(np.asarray(y, np.float32), expected, atol=1e-4 if dtype == jnp.float32 else 1e-2)
