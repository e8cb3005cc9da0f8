"""The blocks' algebra: attention and norm against their definitions, shortcuts against their inverses."""

import jax.numpy as jnp
import numpy as np
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from osjax.models import dc_ae_blocks as blocks

TOLERANCE = 1e-5  # float32, the same sums in another order


def random(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def test_attention_is_a_weighted_mean_of_the_values():
    q, k, v = random(3, 2, 6, 2, 4) + 0.5  # some channel of each answers
    actual = blocks.relu_attention(*map(jnp.asarray, (q, k, v)))
    weights = np.einsum("bngd,bmgd->bgnm", np.maximum(q, 0), np.maximum(k, 0))
    expected = np.einsum("bgnm,bmgd->bngd", weights / weights.sum(-1, keepdims=True), v)
    np.testing.assert_allclose(actual, expected, atol=TOLERANCE)


def test_a_query_that_no_key_answers_gets_nothing():
    q = jnp.ones((1, 3, 1, 2))
    assert not np.any(blocks.relu_attention(q, -q, q))
    assert blocks.relu_attention(*(x.astype(jnp.bfloat16) for x in (q, q, q))).dtype == jnp.float32


factors = st.tuples(st.integers(1, 2), st.integers(1, 2), st.integers(1, 3))


@given(factors, st.integers(1, 3))
def test_channels_and_space_are_each_others_inverse(factors, channels):
    i, j, k = factors
    x = random(1, 2 * i, 2 * j, k, channels)
    cells = blocks.space_to_channels(x, factors)
    assert cells.shape == (1, 2, 2, 1, channels * i * j * k)
    np.testing.assert_array_equal(blocks.channels_to_space(cells, factors), x)
    # Offset (a, b, c) of channel n is channel n·i·j·k + (a·j + b)·k + c.
    np.testing.assert_array_equal(cells[0, 1, 1, 0, -1], x[0, -1, -1, -1, -1])
    np.testing.assert_array_equal(cells[0, 1, 0, 0, 0], x[0, i, 0, 0, 0])


@given(st.integers(1, 4), st.integers(1, 3))
def test_averages_undo_repetitions(channels, times):
    x = random(1, 1, 2, 2, channels)
    repeated = blocks.repeat_channels(x, channels * times)
    np.testing.assert_array_equal(repeated[..., :times], np.repeat(x[..., :1], times, -1))
    np.testing.assert_allclose(blocks.average_channels(repeated, channels), x, atol=TOLERANCE)


def test_the_norm_divides_by_the_root_mean_square_of_the_channels():
    norm = blocks.Norm(4, rngs=nnx.Rngs(0), dtype=jnp.float32)
    norm.scale[...], norm.bias[...] = jnp.arange(4.0), jnp.ones(4)
    x = random(2, 1, 1, 1, 4)
    expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * np.arange(4) + 1
    np.testing.assert_allclose(norm(jnp.asarray(x)), expected, atol=TOLERANCE)
