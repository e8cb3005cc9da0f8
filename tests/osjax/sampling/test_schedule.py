"""The schedule falls from 1 to 0, and the shift is where the published line puts it."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from osjax.sampling import schedule

STEPS = st.integers(1, 200)
TOKENS = st.integers(1, 20_000)
FRAMES = st.integers(1, 33)
ALPHAS = st.floats(0.05, 50.0)


@given(STEPS, TOKENS, FRAMES, st.booleans(), st.none() | ALPHAS)
def test_levels_fall_from_one_to_zero(steps, tokens, frames, shift, flow_shift):
    levels = schedule.timesteps(steps, tokens, frames, shift=shift, flow_shift=flow_shift)
    assert levels.shape == (steps + 1,)
    assert levels.dtype == np.float32
    assert levels[0] == 1.0
    assert levels[-1] == 0.0
    assert np.all(np.diff(levels) < 0)


@pytest.mark.parametrize(
    ("tokens", "frames", "alpha"),
    [(256, 1, 1.0), (4096, 1, 3.0), (2176, 1, 2.0), (4096, 33, 3.0 * math.sqrt(33))],
)
def test_alpha_is_on_the_line(tokens, frames, alpha):
    assert schedule.shift_alpha(tokens, frames) == pytest.approx(alpha, rel=1e-12)


@given(ALPHAS, st.floats(0.0, 1.0))
def test_shift_by_the_inverse_shifts_back(alpha, s):
    """float64; the condition number is at most max(α, 1/α) = 50, so 1e-13 is a few hundred roundings."""
    assert schedule.time_shift(1 / alpha, schedule.time_shift(alpha, s)) == pytest.approx(s, abs=1e-13)


@given(st.floats(1.01, 50.0), st.floats(0.01, 0.99))
def test_a_larger_alpha_is_noisier(alpha, s):
    assert s < schedule.time_shift(alpha, s) < 1
    assert 0 < schedule.time_shift(1 / alpha, s) < s


def test_flow_shift_replaces_space_and_time_and_shift_off_beats_it():
    shifted = schedule.timesteps(4, 4096, 33, flow_shift=3.0)
    np.testing.assert_array_equal(shifted, schedule.timesteps(4, 4096, 1))  # the line gives 3 there
    uniform = schedule.timesteps(4, 4096, 33, shift=False, flow_shift=3.0)
    np.testing.assert_array_equal(uniform, [1.0, 0.75, 0.5, 0.25, 0.0])


def test_training_shifts_device_arrays():
    s = jnp.array([0.0, 0.5, 1.0])
    np.testing.assert_allclose(schedule.time_shift(3.0, s), [0.0, 0.75, 1.0], rtol=1e-6)  # float32
