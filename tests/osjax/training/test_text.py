"""Captions into a step: dropout, and both kinds of prompts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from osjax.sampling.latents import Text
from osjax.training.text import TokenIds, drop, embed

COUNT = 4000


def ids(batch, value):
    return TokenIds(np.full((batch, 6), value, np.int32), np.full((batch, 5), value, np.int32))


def encoded(batch, value):
    return Text(jnp.full((batch, 6, 3), value, jnp.float16), jnp.full((batch, 4), value, jnp.float16))


def gone(prompts):
    """Which rows of either half are those of the empty prompt, 0 in these tests; a row goes as a whole."""
    rows = [np.asarray(half).reshape(len(half), -1) for half in prompts]
    assert all((half == half[:, :1]).all() for half in rows)
    return [half[:, 0] == 0 for half in rows]


@pytest.mark.parametrize("make", [ids, encoded])
def test_halves_are_dropped_each_by_itself(make):
    """Shares of 4,000 rows: four deviations are 0.03."""
    prompts = jax.jit(drop, static_argnums=(3, 4))(make(COUNT, 1), make(1, 0), jax.random.key(0), 0.316, 0.6)
    assert type(prompts) is type(make(1, 0))
    for half, before in zip(prompts, make(COUNT, 1), strict=True):
        assert half.dtype == before.dtype
    t5, clip = gone(prompts)
    assert t5.mean() == pytest.approx(0.316, abs=0.03)
    assert clip.mean() == pytest.approx(0.6, abs=0.03)
    assert (t5 & clip).mean() == pytest.approx(0.316 * 0.6, abs=0.025)


@pytest.mark.parametrize("make", [ids, encoded])
@pytest.mark.parametrize("chance", [0.0, 1.0])
def test_none_or_all(make, chance):
    prompts = drop(make(50, 1), make(1, 0), jax.random.key(1), chance, 1 - chance)
    assert [half.mean() for half in gone(prompts)] == [chance, 1 - chance]


def test_another_key_drops_others():
    first, same, other = (
        np.stack(gone(drop(ids(100, 1), ids(1, 0), jax.random.key(seed), 0.5, 0.5))) for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, same)
    assert (first != other).any()


def test_what_is_encoded_needs_no_encoder():
    text = encoded(2, 1)
    assert embed({}, text) is text


def test_ids_go_through_the_encoders():
    """T5 gives a state for each token, CLIP (states, pooled)."""
    modules = {"t5": lambda ids_bl: ids_bl[..., None] * 2, "clip": lambda ids_bl: ("states", ids_bl[:, 0])}
    text = embed(modules, ids(3, 7))
    assert text.states_blc.shape == (3, 6, 1)
    assert (text.states_blc == 14).all()
    assert text.pooled_bp.tolist() == [7, 7, 7]
