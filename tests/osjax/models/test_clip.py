"""CLIP's text model: causality, where it pools, its activations, and low precision."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from osjax import leaves
from osjax.errors import OsjaxError
from osjax.models.clip import CLIPText, CLIPTextConfig, quick_gelu

CONFIG = CLIPTextConfig(
    hidden_size=24,
    intermediate_size=40,
    num_hidden_layers=3,
    num_attention_heads=3,
    max_position_embeddings=8,
    vocab_size=32,
)
IDS_BL = jnp.asarray([[30, 4, 9, 31, 31, 31], [30, 8, 7, 31, 31, 31]], jnp.int32)


def clip(dtype=jnp.float32, **changes) -> CLIPText:
    return CLIPText(dataclasses.replace(CONFIG, **changes), rngs=nnx.Rngs(0), dtype=dtype)


def test_scan_equals_loop():
    model = clip()
    states_blc = model.token_embed(IDS_BL) + model.position_embed(jnp.arange(IDS_BL.shape[1]))
    for layer in range(CONFIG.num_hidden_layers):
        states_blc = jax.tree.map(lambda leaf, i=layer: leaf[i], model.blocks)(states_blc)
    # The same float32 operations, fused differently: a few ulp.
    np.testing.assert_allclose(model(IDS_BL)[0], model.final_norm(states_blc), rtol=1e-5, atol=1e-5)


def test_states_depend_on_earlier_tokens_only():
    model = clip()
    before, _ = model(IDS_BL)
    after, _ = model(IDS_BL.at[:, 3].set(11))
    np.testing.assert_array_equal(after[:, :3], before[:, :3])
    assert np.abs(after[:, 3:] - before[:, 3:]).max(axis=(0, 2)).min() > 1e-3


@pytest.mark.parametrize(
    ("eos_token_id", "ids", "end"),
    [
        (2, [30, 2, 31, 5, 31, 31], 2),  # the legacy id: the first highest one
        (2, [30, 2, 9, 4, 5, 6], 0),
        (31, [30, 4, 31, 9, 31, 31], 2),
        (7, [30, 4, 31, 7, 7, 7], 3),  # the first end-of-text id, though another is higher
    ],
)
def test_pools_at_the_end_of_text(eos_token_id, ids, end):
    states_blc, pooled_bc = clip(eos_token_id=eos_token_id)(jnp.asarray([ids], jnp.int32))
    np.testing.assert_array_equal(pooled_bc[0], states_blc[0, end])


def test_padding_behind_the_end_does_not_matter():
    model = clip()
    # Lengths compile to different programs, which agree to a few ulp.
    np.testing.assert_allclose(model(IDS_BL[:, :4])[1], model(IDS_BL)[1], rtol=1e-5, atol=1e-5)


def test_activations():
    x = np.linspace(-6, 6, 101)
    np.testing.assert_allclose(quick_gelu(jnp.asarray(x)), x / (1 + np.exp(-1.702 * x)), rtol=1e-5, atol=1e-6)
    difference = np.abs(clip()(IDS_BL)[1] - clip(hidden_act="gelu")(IDS_BL)[1]).max()
    assert 1e-5 < difference < 0.1  # not the same function, but nearly


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"hidden_act": "relu"}, "hidden_act is 'relu': .*quick_gelu"), ({"num_attention_heads": 5}, "24 .* 5 heads: ")],
)
def test_unsupported_configs_are_refused(changes, message):
    with pytest.raises(OsjaxError, match=message):
        clip(**changes)


@pytest.mark.parametrize(("dtype", "digits"), [(jnp.bfloat16, 8), (jnp.float16, 11)])
def test_low_precision(dtype, digits):
    model = clip()
    cast = {name: value.astype(dtype) for name, value in leaves.flatten(model).items()}
    exact, low = model(IDS_BL), leaves.unflatten(clip(dtype), cast)(IDS_BL)
    for reference, value in zip(exact, low, strict=True):
        assert value.dtype == dtype
        # Three blocks round some ten values in a row; each rounding is half of 2^-digits of a value of order 1 to 3.
        np.testing.assert_allclose(value.astype(jnp.float32), reference, atol=16 * 2.0**-digits)
