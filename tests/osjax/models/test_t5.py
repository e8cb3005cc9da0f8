"""T5: position buckets, the three feed-forward layers, padding that is attended to, and low precision."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from osjax import leaves
from osjax.errors import OsjaxError
from osjax.models.t5 import T5Block, T5Config, T5Encoder, relative_buckets

CONFIG = T5Config(d_model=24, d_kv=8, d_ff=40, num_heads=3, num_layers=3, vocab_size=32)
IDS_BL = jnp.asarray([[5, 9, 30, 1, 0, 0], [7, 7, 2, 8, 3, 1]], jnp.int32)


def encoder(dtype=jnp.float32, **changes) -> T5Encoder:
    return T5Encoder(dataclasses.replace(CONFIG, **changes), rngs=nnx.Rngs(0), dtype=dtype)


def test_published_bucket_borders():
    buckets = relative_buckets(200, 32, 128)
    first_distance = {int(bucket): int(np.argmax(buckets[:, 0] == bucket)) for bucket in np.unique(buckets[:, 0])}
    borders = [*range(8), 8, 12, 16, 23, 32, 46, 64, 91]  # 8 · 16^(k/8), rounded up
    assert first_distance == dict(enumerate(borders))


@given(st.integers(1, 300), st.sampled_from([4, 8, 16, 32]), st.integers(20, 400))
@settings(max_examples=30, deadline=None)
def test_buckets_grow_with_distance_and_split_by_side(length, num_buckets, max_distance):
    buckets = relative_buckets(length, num_buckets, max_distance)
    behind, after = buckets[:, 0], buckets[0]
    assert buckets.dtype == np.int32
    assert buckets.min() >= 0
    assert buckets.max() < num_buckets
    assert (np.diff(behind) >= 0).all()
    np.testing.assert_array_equal(after[1:], behind[1:] + num_buckets // 2)
    np.testing.assert_array_equal(np.diag(buckets), 0)


def test_scan_equals_loop():
    model = encoder()
    states_blc = model.embed(IDS_BL)
    bias = model._position_bias(IDS_BL.shape[1])
    for layer in range(CONFIG.num_layers):
        states_blc = jax.tree.map(lambda leaf, i=layer: leaf[i], model.blocks)(states_blc, bias)
    # The same float32 operations, fused differently: a few ulp.
    np.testing.assert_allclose(model(IDS_BL), model.final_norm(states_blc), rtol=1e-5, atol=1e-5)


def test_padding_is_attended_to():
    model = encoder()
    longer = jnp.pad(IDS_BL, ((0, 0), (0, 4)))
    assert np.abs(model(longer)[:, : IDS_BL.shape[1]] - model(IDS_BL)).max() > 1e-3


@pytest.mark.parametrize(
    ("name", "activation"),
    [
        ("gated-gelu", lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))),
        ("gated-silu", lambda x: x / (1 + np.exp(-x))),
        ("relu", lambda x: np.maximum(x, 0)),
    ],
)
def test_feed_forward(name, activation):
    config = dataclasses.replace(CONFIG, feed_forward_proj=name)
    block = T5Block(config, rngs=nnx.Rngs(0), dtype=jnp.float32)
    block.o.kernel[...] = jnp.zeros_like(block.o.kernel[...])  # leaves the feed-forward layer alone
    x = np.asarray(jax.random.normal(jax.random.key(1), (1, 4, CONFIG.d_model)), np.float64)
    normed = x / np.sqrt(np.square(x).mean(-1, keepdims=True) + config.layer_norm_epsilon)
    hidden = activation(normed @ np.asarray(block.wi.kernel[...], np.float64))
    if name.startswith("gated"):
        hidden = hidden * (normed @ np.asarray(block.gate.kernel[...], np.float64))
    else:
        assert block.gate is None
    expected = x + hidden @ np.asarray(block.wo.kernel[...], np.float64)
    bias = jnp.zeros((1, config.num_heads, 4, 4))
    np.testing.assert_allclose(block(jnp.asarray(x, jnp.float32), bias), expected, rtol=1e-5, atol=1e-5)


def test_other_feed_forward_layers_are_refused():
    with pytest.raises(OsjaxError, match=r"feed_forward_proj is 'gated-tanh': .*gated-gelu"):
        encoder(feed_forward_proj="gated-tanh")


@pytest.mark.parametrize(("dtype", "digits"), [(jnp.bfloat16, 8), (jnp.float16, 11)])
def test_low_precision(dtype, digits):
    model = encoder()
    cast = {name: value.astype(dtype) for name, value in leaves.flatten(model).items()}
    exact, low = model(IDS_BL), leaves.unflatten(encoder(dtype), cast)(IDS_BL)
    assert low.dtype == dtype
    # Three blocks round some ten values in a row; each rounding is half of 2^-digits of a value of order 1 to 3.
    np.testing.assert_allclose(low.astype(jnp.float32), exact, atol=16 * 2.0**-digits)


def test_residual_stream_beyond_float16():
    model = encoder(jnp.float16)
    model.blocks.wo.kernel[...] = jnp.full_like(model.blocks.wo.kernel[...], 30000.0)
    assert np.isfinite(model(IDS_BL)).all()


def test_half_precision_reaches_beyond_its_range_between_the_two_layers():
    """XXL's hidden activations, and their sums, are larger than float16 can tell."""
    exact = encoder()
    arrays = leaves.flatten(exact)
    large = arrays | {name: 3e3 * arrays[name] for name in ("blocks.wi.kernel", "blocks.gate.kernel")}
    large["blocks.wo.kernel"] = 1e-4 * arrays["blocks.wo.kernel"]
    states = leaves.unflatten(exact, large)(IDS_BL)
    half = leaves.unflatten(encoder(jnp.float16), {k: v.astype(jnp.float16) for k, v in large.items()})(IDS_BL)
    np.testing.assert_allclose(half.astype(jnp.float32), states, atol=0.02 * float(jnp.abs(states).max()))
