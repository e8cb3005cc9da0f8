"""The schedule's ends, one update by hand, and the average of the weights."""

import itertools

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from osjax.training.optim import learning_rate, moving_average, optimizer
from osjax.training.options import OptimOptions

# Rates are float32: a few roundings of 6e-8 each.
TOLERANCE = 1e-5
schedules = st.sampled_from(("constant", "cosine"))


def rate(options, total, step):
    return float(learning_rate(options, total)(step))


@given(schedule=schedules, warmup=st.integers(1, 20), rest=st.integers(1, 50), share=st.floats(0, 1))
@settings(deadline=None, max_examples=30)
def test_warm_up_takes_equal_parts_and_ends_at_the_rate(schedule, warmup, rest, share):
    options = OptimOptions(lr=2e-4, warmup_steps=warmup, schedule=schedule, final_lr_share=share)
    found = [rate(options, warmup + rest, step) for step in range(warmup + 1)]
    expected = [2e-4 * (step + 1) / warmup for step in range(warmup)]
    np.testing.assert_allclose(found, [*expected, 2e-4], rtol=TOLERANCE)


@given(warmup=st.integers(0, 20), rest=st.integers(1, 50), share=st.floats(0, 1))
@settings(deadline=None, max_examples=30)
def test_cosine_falls_to_its_share_at_the_end_of_the_run(warmup, rest, share):
    options = OptimOptions(lr=1e-3, warmup_steps=warmup, schedule="cosine", final_lr_share=share)
    total = warmup + rest
    found = [rate(options, total, step) for step in range(warmup, total + 1)]
    assert found[0] == pytest.approx(1e-3, rel=TOLERANCE)
    assert found[-1] == pytest.approx(share * 1e-3, rel=TOLERANCE, abs=1e-10)
    assert all(later <= earlier * (1 + TOLERANCE) for earlier, later in itertools.pairwise(found))
    assert rate(options, total, total + 100) == pytest.approx(found[-1])
    if rest % 2 == 0:
        assert found[rest // 2] == pytest.approx(1e-3 * (1 + share) / 2, rel=TOLERANCE)


def test_constant_stays():
    assert {rate(OptimOptions(lr=3e-4), 10, step) for step in (0, 5, 10, 1000)} == {3e-4}


def test_a_warm_up_longer_than_the_run():
    options = OptimOptions(lr=1.0, warmup_steps=10, schedule="cosine")
    assert rate(options, 5, 4) == pytest.approx(0.5)


@given(
    gradient=st.lists(st.floats(-100, 100, width=32), min_size=2, max_size=4),
    clip=st.floats(0.1, 10),
    decay=st.floats(0, 0.5),
)
@settings(deadline=None, max_examples=15)
def test_first_update_by_hand(gradient, clip, decay):
    """Clipping scales the whole gradient; the first step of Adam is then g / (|g| + eps) for each element, and the
    weight's own decay comes beside it. Both with the rate in front."""
    weights = {"w": jnp.full(len(gradient), 2.0)}
    options = OptimOptions(lr=0.1, eps=1e-3, clip_norm=clip, weight_decay=decay)
    tx = optimizer(options, 10)
    updates, _ = tx.update({"w": jnp.asarray(gradient)}, tx.init(weights), weights)
    clipped = np.asarray(gradient) * min(1.0, clip / max(np.linalg.norm(gradient), 1e-30))
    expected = -0.1 * (clipped / (np.abs(clipped) + 1e-3) + decay * 2.0)
    np.testing.assert_allclose(updates["w"], expected, rtol=1e-4, atol=1e-6)


def test_every_weight_decays():
    """Vectors too, as PyTorch's AdamW does unless it is told otherwise."""
    weights = {"kernel": jnp.ones((2, 2)), "bias": jnp.ones(2)}
    tx = optimizer(OptimOptions(lr=0.1, weight_decay=0.5), 10)
    updates, _ = tx.update({name: jnp.zeros_like(each) for name, each in weights.items()}, tx.init(weights), weights)
    after = optax.apply_updates(weights, updates)
    assert all(np.allclose(each, 0.95) for each in after.values())


def test_average_by_hand():
    """decay 0.15 from the second step on, of which the first keeps 1/10 only."""
    average = {"w": jnp.array([1.0])}
    average = moving_average(average, {"w": jnp.array([2.0])}, jnp.int32(0), 0.15)
    np.testing.assert_allclose(average["w"], [0.1 * 1 + 0.9 * 2], rtol=1e-6)
    average = moving_average(average, {"w": jnp.array([5.0])}, jnp.int32(1), 0.15)
    np.testing.assert_allclose(average["w"], [0.15 * 1.9 + 0.85 * 5], rtol=1e-6)


@given(weights=st.lists(st.floats(-10, 10, width=32), min_size=1, max_size=20), decay=st.floats(0.5, 0.9999))
@settings(deadline=None, max_examples=20)
def test_average_stays_between_what_it_is_of_and_forgets_the_start(weights, decay):
    start = 1000.0
    average, left = {"w": jnp.float32(start)}, 1.0
    for step, weight in enumerate(weights):
        average = moving_average(average, {"w": jnp.float32(weight)}, jnp.int32(step), decay)
        left *= min(decay, (1 + step) / (10 + step))
    assert left <= 0.1
    # The start's part of the average is `left`; the rest is of weights within ±10.
    assert abs(float(average["w"]) - left * start) <= 10 * (1 - left) + 1e-2


def test_no_average_stays_none():
    assert moving_average({}, {"w": jnp.ones(2)}, jnp.int32(3), 0.0) == {}
