"""Which latent frames a training clip is given."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from osjax.errors import OsjaxError
from osjax.sampling.condition import CONDITION_KINDS, condition_kind
from osjax.training.batches import Latents
from osjax.training.conditions import all_ends, condition_clips, drawn_kinds, ends_of

RATIO = 4
KEY = jax.random.key(0)
EVERY = dict.fromkeys(CONDITION_KINDS, 1.0)


def clips(batch, t, weights=EVERY):
    """Clean latents are 1 …, those of each end are told apart by their value and position."""
    z = np.ones((batch, t, 2, 2, 3), np.float32)
    ends = {}
    for number, (side, frames) in enumerate(all_ends(weights, RATIO)):
        count = min(t, 1 + (frames - 1) // RATIO)
        values = 100 * (number + 1) + np.arange(count, dtype=np.float32)
        ends[side, frames] = jnp.asarray(np.broadcast_to(values[None, :, None, None, None], (batch, count, 2, 2, 3)))
    return Latents(jnp.asarray(z), ends)


def given_by(kind, t):
    """What the only drawn kind does to a clip of t latent frames: (mask [t], given [t]), rows and columns alike."""
    latents = clips(2, t)
    clean = condition_clips(latents, {kind: 3.0}, RATIO, KEY)
    np.testing.assert_array_equal(clean.z_bthwc, latents.z_bthwc)
    assert clean.mask_bthw1.shape == (2, t, 2, 2, 1)
    mask_t, given_t = clean.mask_bthw1[0, :, 0, 0, 0], clean.given_bthwc[0, :, 0, 0, 0]
    for each, found_t in ((clean.mask_bthw1, mask_t), (clean.given_bthwc, given_t)):
        np.testing.assert_array_equal(each, np.broadcast_to(found_t[:, None, None, None], each.shape))
    return mask_t.tolist(), given_t.tolist()


def value(kind, side, at=0):
    """What `clips` puts at place `at` of the reference at that side."""
    (end,) = [end for end in ends_of(condition_kind(kind), RATIO) if end[0] == side]
    return 100.0 * (1 + all_ends(EVERY, RATIO).index(end)) + at


def test_images_give_one_latent_frame_at_their_ends():
    head, tail = value("i2v_head", "head"), value("i2v_tail", "tail")
    assert given_by("t2v", 4) == ([0, 0, 0, 0], [0, 0, 0, 0])
    assert given_by("i2v_head", 4) == ([1, 0, 0, 0], [head, 0, 0, 0])
    assert given_by("i2v_tail", 4) == ([0, 0, 0, 1], [0, 0, 0, tail])
    assert given_by("i2v_loop", 4) == ([1, 0, 0, 1], [head, 0, 0, tail])


@pytest.mark.parametrize(("kind", "latents"), [("v2v_head", 9), ("v2v_head_easy", 17)])
def test_clips_give_their_groups_and_the_frame_before_them(kind, latents):
    t = latents + 2
    values = [value(kind, "head", at) for at in range(latents)]
    assert given_by(kind, t) == ([1] * latents + [0, 0], [*values, 0, 0])
    tail = kind.replace("head", "tail")
    values = [value(tail, "tail", at) for at in range(latents)]
    assert given_by(tail, t) == ([0, 0] + [1] * latents, [0, 0, *values])


@given(t=st.integers(1, 20), seed=st.integers(0, 2**31))
@settings(deadline=None, max_examples=10)
def test_something_is_left_to_learn_and_nothing_else_is_shown(t, seed):
    clean = condition_clips(clips(8, t), EVERY, RATIO, jax.random.key(seed))
    assert set(np.unique(clean.mask_bthw1)) <= {0.0, 1.0}
    assert not np.asarray(clean.mask_bthw1).all(axis=(1, 2, 3, 4)).any()
    shown = np.asarray(clean.given_bthwc) != 0
    np.testing.assert_array_equal(shown, np.broadcast_to(np.asarray(clean.mask_bthw1) == 1, shown.shape))


def test_a_single_frame_is_given_nothing():
    clean = condition_clips(clips(4, 1), {"i2v_head": 1.0, "v2v_tail": 1.0}, RATIO, KEY)
    assert not clean.mask_bthw1.any()
    assert not clean.given_bthwc.any()


def test_kinds_that_would_give_the_whole_clip_are_not_drawn():
    """i2v_loop of two latent frames leaves nothing between, v2v_head of nine nothing behind."""
    weights = {"i2v_loop": 1000.0, "v2v_head": 1000.0, "i2v_head": 1.0}
    clean = condition_clips(clips(16, 2), weights, RATIO, KEY)
    np.testing.assert_array_equal(clean.mask_bthw1[:, :, 0, 0, 0], [[1, 0]] * 16)
    with pytest.raises(OsjaxError, match="leaves anything to learn of 2 latent frames: add t2v"):
        condition_clips(clips(4, 2), {"i2v_loop": 1.0, "v2v_head": 1.0}, RATIO, KEY)


def test_kinds_are_drawn_as_often_as_they_weigh():
    """Of 4,000 clips; four deviations of a binomial share are below 0.032."""
    weights = {"t2v": 1.0, "i2v_head": 5.0, "i2v_loop": 1.0, "i2v_tail": 3.0, "v2v_head": 0.0}
    masks = np.asarray(condition_clips(clips(4000, 3), weights, RATIO, KEY).mask_bthw1[:, :, 0, 0, 0])
    patterns = {"t2v": [0, 0, 0], "i2v_head": [1, 0, 0], "i2v_loop": [1, 0, 1], "i2v_tail": [0, 0, 1]}
    shares = {kind: (masks == pattern).all(axis=1).mean() for kind, pattern in patterns.items()}
    assert sum(shares.values()) == pytest.approx(1)
    for kind, share in shares.items():
        assert share == pytest.approx(weights[kind] / 10, abs=0.032), kind


def test_every_end_is_encoded_once():
    assert all_ends({"t2v": 1.0}, RATIO) == ()
    assert all_ends({"i2v_head": 1.0, "i2v_loop": 2.0, "v2v_head": 1.0}, RATIO) == (
        ("head", 1),
        ("head", 33),
        ("tail", 1),
    )
    assert all_ends({"t2v": 1.0, "v2v_tail_easy": 1.0, "i2v_tail": 0.0}, 8) == (("tail", 129),)


@pytest.mark.parametrize(
    ("weights", "message"),
    [
        ({}, "draws no kind: give at least one, such as t2v"),
        ({"t2v": 0.0, "i2v_head": 0}, "draws no kind"),
        ({"i2v_haed": 1.0}, "unknown cond_type 'i2v_haed': did you mean i2v_head"),
    ],
)
def test_weights_that_draw_nothing(weights, message):
    with pytest.raises(OsjaxError, match=message):
        drawn_kinds(weights)
