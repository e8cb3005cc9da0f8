"""Guidance by weights equals the three-branch formula, at the passes that the weights say."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from osjax.sampling import guidance
from osjax.sampling.guidance import Guidance

SCALES = st.one_of(st.just(1.0), st.just(0.0), st.floats(-2.0, 12.0))
GUIDANCES = st.builds(Guidance, SCALES, SCALES, st.booleans(), st.booleans(), st.booleans())


def three_branches(options: Guidance, step, steps, latent_frames, image_condition, v1, v2, v3) -> np.ndarray:
    """Upstream's formula as the specification gives it (section 7), in float64; velocities [t, c]."""
    text, image = options.text, options.image
    if step >= 10 and step % 2 == 1:
        text = 1.0 if options.text_osci else text
        image = 1.0 if options.image_osci else image
    if options.scale_temporal_osci and image_condition and image > 1.0:
        upper = image + (1.0 - image) * step / steps
        image = np.linspace(1.0, upper, latent_frames)[:, None]
    return v3 + image * (v2 - v3) + text * (v1 - v2)


@given(
    GUIDANCES,
    st.integers(0, 19),
    st.integers(1, 5),
    st.booleans(),
    st.booleans(),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_equals_the_three_branch_formula(
    options, step, latent_frames, image_condition, same_text, same_condition, seed
):
    """Tolerance: float32 weights (relative error 6e-8) of at most 14, times normal velocities, summed over three."""
    steps = 20
    v1, v2, v3 = np.random.default_rng(seed).normal(size=(3, latent_frames, 4))
    v2 = v1 if same_text else v2
    v3 = v2 if same_condition else v3
    expected = three_branches(options, step, steps, latent_frames, image_condition, v1, v2, v3)

    levels = guidance.step_levels(options, step, steps, latent_frames, image_condition)
    guided = guidance.guided_step(levels, same_text=same_text, same_condition=same_condition)
    velocities = np.stack([v1, v2, v3])[list(guided.branches)]
    np.testing.assert_allclose(np.einsum("kt,ktc->tc", guided.weights_kt, velocities), expected, rtol=0, atol=1e-5)
    # The same before the weights are rounded to float32: nothing but float64 rounding is left.
    exact = np.einsum("kt,ktc->tc", np.diff(levels, axis=0, prepend=0.0), np.stack([v1, v2, v3]))
    np.testing.assert_allclose(exact, expected, rtol=0, atol=1e-12)


@given(GUIDANCES, st.integers(0, 40), st.integers(1, 5), st.booleans(), st.booleans(), st.booleans())
def test_weights_sum_to_one_and_none_is_idle(options, step, latent_frames, image_condition, same_text, same_condition):
    levels = guidance.step_levels(options, step, 41, latent_frames, image_condition)
    guided = guidance.guided_step(levels, same_text=same_text, same_condition=same_condition)
    assert guided.weights_kt.shape == (len(guided.branches), latent_frames)
    assert guided.weights_kt.dtype == np.float32
    assert np.all(guided.weights_kt.any(axis=1))
    np.testing.assert_allclose(guided.weights_kt.sum(axis=0), 1.0, atol=1e-5)  # float32 weights of at most 14
    if len(guided.branches) == 1:
        assert np.all(guided.weights_kt == 1.0)  # exactly: then the velocity is passed on unchanged


@pytest.mark.parametrize(
    ("options", "reference", "passes"),
    [
        (Guidance(), False, 80),
        (Guidance(), True, 110),
        (Guidance(scale_temporal_osci=False), True, 110),
        (Guidance(text_osci=False, image_osci=False), False, 100),
        (Guidance(text_osci=False, image_osci=False), True, 150),
        (Guidance(text_osci=False), True, 130),  # 20 steps of text guidance alone, for which v3 has no weight
        (Guidance(text=1.0, image=1.0), True, 50),
        (Guidance(text=1.0, image=1.0), False, 50),
        (Guidance(text=3.0, image=3.0, scale_temporal_osci=False), True, 80),  # v2 cancels when the scales are equal
    ],
)
def test_forward_passes_of_fifty_steps(options, reference, passes):
    steps = guidance.plan(options, 50, 33, image_condition=reference, same_text=False, same_condition=not reference)
    assert len(steps) == 50
    assert guidance.forward_passes(steps) == passes


@given(GUIDANCES, st.booleans(), st.booleans())
def test_equal_branches_are_computed_once(options, image_condition, same_condition):
    steps = guidance.plan(
        options, 12, 3, image_condition=image_condition, same_text=True, same_condition=same_condition
    )
    assert all(0 not in step.branches for step in steps)  # v1 is v2, which stands for both
    if same_condition:
        assert [step.branches for step in steps] == [(2,)] * 12


def test_without_a_reference_the_second_branch_is_the_third():
    step = guidance.guided_step(np.array([[7.5], [3.0], [1.0]]), same_text=False, same_condition=True)
    assert step.branches == (0, 2)
    np.testing.assert_array_equal(step.weights_kt, [[7.5], [-6.5]])


@given(st.floats(-2.0, 12.0), st.integers(0, 60), st.integers(0, 20))
def test_oscillation(scale, step, force):
    expected = 1.0 if step in range(force, 61) and step in range(1, 61, 2) else scale
    assert guidance.oscillating(scale, step, force) == expected


def test_temporal_scaling_is_for_images_and_scales_above_one_only():
    always = Guidance(text_osci=False, image_osci=False)
    for image, image_condition in itertools.product([0.5, 1.0, 3.0], [False, True]):
        options = Guidance(always.text, image, False, False, True)
        levels = guidance.step_levels(options, 0, 10, 3, image_condition)
        scaled = [1.0, 2.0, 3.0] if image_condition and image > 1 else [image] * 3
        np.testing.assert_array_equal(levels, [[7.5] * 3, scaled, [1.0] * 3])


def test_temporal_scaling_is_skipped_where_oscillation_turns_the_image_scale_to_one():
    levels = guidance.step_levels(Guidance(), 11, 50, 4, image_condition=True)
    np.testing.assert_array_equal(levels, np.ones((3, 4)))


@given(st.floats(1.0, 12.0), st.integers(1, 60), st.integers(2, 33))
def test_image_scale_rises_over_frames_and_falls_over_steps(scale, steps, frames):
    per_step = [guidance.image_scale_per_frame(scale, step, steps, frames) for step in range(steps)]
    assert per_step[0][-1] == scale
    for scale_t in per_step:
        assert scale_t[0] == 1.0
        assert np.all(np.diff(scale_t) >= 0)
    assert np.all(np.diff([scale_t[-1] for scale_t in per_step]) <= 0)
