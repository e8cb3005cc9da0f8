"""Convolution, norm and upsampling over videos, against sums written out."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from osjax.kernels.convolution import xla_convolution
from osjax.models import conv3d
from osjax.models.autoencoder_2d import FrameConv
from osjax.models.conv3d import CausalConv3D, Factors, VideoConv, convolved_by, group_norm, pad_border

TOLERANCE = 1e-5  # float32 sums of at most a few hundred terms of order one
FACTORS = [(1, 1, 1), (1, 2, 2), (2, 2, 2), (2, 1, 1), (3, 1, 2)]


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


def upsampled(x_bthwc: jax.Array, factors: Factors) -> jax.Array:
    """Every element repeated, but the first frame only in height and width."""
    time, height, width = factors
    x_bthwc = jnp.repeat(jnp.repeat(x_bthwc, height, axis=2), width, axis=3)
    return jnp.repeat(x_bthwc, time, axis=1)[:, time - 1 :]


def some_conv(kind: type[VideoConv]) -> VideoConv:
    conv = kind(3, 4, rngs=nnx.Rngs(0))
    conv.bias[...] = jnp.arange(4.0)
    return conv


@pytest.mark.parametrize("kind", [CausalConv3D, FrameConv])
@pytest.mark.parametrize("factors", FACTORS)
@pytest.mark.parametrize("size", [(1, 1, 1), (1, 3, 2), (2, 1, 4), (5, 4, 3)])
def test_a_convolution_of_what_is_upsampled_does_not_need_it(kind, factors, size):
    conv, x = some_conv(kind), random(2, *size, 3)
    expected = conv(upsampled(x, factors))
    actual = conv.of_upsampled(x, factors)
    assert actual.shape == expected.shape
    np.testing.assert_allclose(actual, expected, atol=TOLERANCE)


@pytest.mark.parametrize("frames", [1, 3])
def test_a_convolution_of_what_is_upsampled_has_the_same_gradients(frames):
    x, weights = random(1, frames, 3, 2, 3), random(1, 2 * frames - 1, 6, 4, 4)

    def gradients(convolve):
        return jax.grad(lambda conv, x: (convolve(conv, x) * weights).sum(), argnums=(0, 1))(some_conv(CausalConv3D), x)

    expected = gradients(lambda conv, x: conv(upsampled(x, (2, 2, 2))))
    actual = gradients(lambda conv, x: conv.of_upsampled(x, (2, 2, 2)))
    for ours, theirs in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
        assert np.abs(theirs).max() > 0.1
        np.testing.assert_allclose(ours, theirs, atol=10 * TOLERANCE)


@pytest.mark.parametrize(("frames", "elements"), [(9, 300), (7, 100), (2, 1)])
def test_large_arrays_are_convolved_a_few_frames_at_a_time(monkeypatch, frames, elements):
    conv, x, residual = some_conv(CausalConv3D), random(1, frames, 3, 4, 3), random(1, frames, 3, 4, 4)
    seen = []

    def counted(x_bthwc, *rest):
        seen.append(x_bthwc.shape[1])
        return xla_convolution(x_bthwc, *rest)

    expected = conv(jnp.tanh(x)) + residual, conv.of_upsampled(x, (2, 2, 2))
    monkeypatch.setattr(conv3d, "AT_ONCE", elements)
    conv.convolve = counted
    np.testing.assert_allclose(conv(x, residual, before=jnp.tanh), expected[0], atol=TOLERANCE)
    assert len(seen) > 1
    assert max(seen) < frames + 2
    np.testing.assert_allclose(conv.of_upsampled(x, (2, 2, 2)), expected[1], atol=TOLERANCE)


@pytest.mark.parametrize("mode", ["edge", "constant"])
@pytest.mark.parametrize("borders", [((2, 0), (1, 1), (1, 1)), ((0, 0), (0, 3), (0, 0)), ((0, 0),) * 3])
def test_a_border_is_numpys(mode, borders):
    x = random(2, 1, 3, 2, 2)
    np.testing.assert_array_equal(pad_border(x, borders, mode), np.pad(x, ((0, 0), *borders, (0, 0)), mode))


def test_other_convolutions_are_put_into_a_copy():
    seen = []

    def other(*arrays):
        seen.append(arrays[0].shape)
        return xla_convolution(*arrays)

    class Some(nnx.Module):
        def __init__(self):
            self.convs = nnx.List([CausalConv3D(3, 3, rngs=nnx.Rngs(0)), FrameConv(3, 3, rngs=nnx.Rngs(0))])
            self.strided = CausalConv3D(3, 3, stride=(2, 2, 2), rngs=nnx.Rngs(0))

        def __call__(self, x):
            for conv in self.convs:
                x = conv(x)
            return self.strided(x)

    model, x = Some(), random(1, 3, 4, 4, 3)
    copy = convolved_by(model, other)
    np.testing.assert_array_equal(copy(x), model(x))
    assert seen == [(1, 5, 6, 6, 3), (1, 3, 6, 6, 3)]
    for mine, theirs in zip(jax.tree.leaves(model), jax.tree.leaves(copy), strict=True):
        assert mine is theirs


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


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("mean", "jump"), [(0, 0), (100, 0), (100, 300)])
def test_group_norm_is_that_of_nnx(dtype, mean, jump):
    """jump: of all frames against the first, from whose mean differences are taken."""
    x = mean + random(2, 9, 8, 8, 6)
    x[:, 1:] += jump
    x = jnp.asarray(x, dtype)
    theirs = nnx.GroupNorm(
        6, 2, epsilon=1e-6, use_fast_variance=False, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0)
    )
    theirs.scale[...], theirs.bias[...] = jnp.arange(1.0, 7.0, dtype=dtype), jnp.arange(6.0, dtype=dtype)
    ours = group_norm(6, 2, rngs=nnx.Rngs(0), dtype=dtype)
    ours.scale[...], ours.bias[...] = theirs.scale[...], theirs.bias[...]
    y, expected = jax.jit(lambda m, x: m(x))(ours, x), theirs(x)
    assert y.dtype == dtype
    atol = 1e-3 if dtype == jnp.float32 else 0.07  # outputs are up to 20: half a unit in the last place of bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), expected.astype(jnp.float32), atol=atol)


def test_group_norm_has_the_gradient_of_nnxs():
    x, weights = 3 + random(1, 3, 4, 4, 6), random(1, 3, 4, 4, 6)
    ours = group_norm(6, 2, rngs=nnx.Rngs(0), dtype=jnp.float32)
    theirs = nnx.GroupNorm(6, 2, epsilon=1e-6, use_fast_variance=False, rngs=nnx.Rngs(0))
    actual, expected = (jax.grad(lambda x, norm=norm: (norm(x) * weights).sum())(x) for norm in (ours, theirs))
    np.testing.assert_allclose(actual, expected, atol=TOLERANCE)
