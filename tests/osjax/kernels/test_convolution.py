"""Which convolution runs where; that of Hopper GPUs has its own tests."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from osjax.kernels.convolution import choose_convolution, hopper_convolution, xla_convolution

H100 = SimpleNamespace(platform="gpu", compute_capability="9.0", device_kind="NVIDIA H100")
A100 = SimpleNamespace(platform="gpu", compute_capability="8.0", device_kind="NVIDIA A100")


@pytest.mark.parametrize(
    ("device", "dtype", "chosen"),
    [
        (H100, jnp.bfloat16, hopper_convolution),
        (H100, jnp.float16, hopper_convolution),
        (H100, jnp.float32, xla_convolution),
        (A100, jnp.bfloat16, xla_convolution),
        (jax.devices("cpu")[0], jnp.bfloat16, xla_convolution),
    ],
)
def test_hopper_has_a_kernel_for_16_bits(device, dtype, chosen):
    assert choose_convolution(device, dtype) is chosen


@pytest.mark.parametrize(("frames", "times"), [(4, 2), (3, 1), (1, 1)])
@pytest.mark.parametrize("strides", [(1, 1, 1), (1, 2, 3)])
def test_xlas_is_a_sum_over_taps(frames, times, strides):
    rng = np.random.default_rng(0)
    x, kernel = rng.standard_normal((2, frames, 5, 7, 3)), rng.standard_normal((times, 3, 2, 3, 4))
    out = tuple((n - k) // s + 1 for n, k, s in zip(x.shape[1:4], kernel.shape, strides, strict=False))
    bias, residual = rng.standard_normal(4), rng.standard_normal((2, *out, 4))
    expected = residual + bias
    for at in np.ndindex(out):
        window = tuple(slice(i * s, i * s + k) for i, s, k in zip(at, strides, kernel.shape, strict=False))
        expected[(slice(None), *at)] += np.einsum("bthwc,thwco->bo", x[(slice(None), *window)], kernel)
    arrays = [jnp.asarray(array, jnp.float32) for array in (x, kernel, bias, residual)]
    np.testing.assert_allclose(xla_convolution(*arrays, strides=strides), expected, atol=1e-5)
    np.testing.assert_allclose(xla_convolution(*arrays[:3], strides=strides) + arrays[3], expected, atol=1e-5)
