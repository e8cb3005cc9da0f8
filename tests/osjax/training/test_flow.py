"""The rectified-flow loss where the reference has no figures: levels shifted otherwise. The rest is in tests/parity."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from osjax.sampling.geometry import pack
from osjax.sampling.latents import Text
from osjax.sampling.schedule import shift_alpha
from osjax.training import flow

CONFIG = types.SimpleNamespace(patch_size=2, cond_embed=False, axes_dim=(2, 4, 4), theta=10_000)


class Echo:
    """Predicts the noisy tokens that it is given, so that the loss tells which level they were at."""

    config = CONFIG

    def __call__(self, img_bnc, *_, **__):
        return img_bnc


@pytest.mark.parametrize("flow_shift", [None, 1.0, 6.0])
def test_levels_are_shifted_by_the_size_or_as_told(flow_shift):
    z_bthwc = jax.random.normal(jax.random.key(0), (3, 2, 4, 6, 5))
    grid = flow.grid_of(z_bthwc, 2)
    drawn = flow.draw(jax.random.key(1), grid, 5, 3)
    clean = flow.Clean(z_bthwc, jnp.zeros((*z_bthwc.shape[:-1], 1)), jnp.zeros_like(z_bthwc))
    text = Text(jnp.zeros((3, 4, 8)), jnp.zeros((3, 8)))
    loss, predicted = flow.flow_loss(Echo(), clean, text, drawn, None, flow_shift=flow_shift)
    alpha = shift_alpha(grid.tokens_per_frame, grid.t) if flow_shift is None else flow_shift
    s_b = alpha * jax.nn.sigmoid(drawn.normal_b) / (1 + (alpha - 1) * jax.nn.sigmoid(drawn.normal_b))
    x_bnc, s_b11 = pack(z_bthwc, 2), s_b[:, None, None]
    noisy = (1 - s_b11) * x_bnc + s_b11 * drawn.noise_bnc
    np.testing.assert_allclose(predicted, noisy, atol=1e-4)  # sigma_min is 1e-5, a normal number at most 5
    expected = jnp.square(noisy - (drawn.noise_bnc - x_bnc)).mean()
    np.testing.assert_allclose(loss, expected, rtol=1e-4)
