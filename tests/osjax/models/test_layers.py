"""Small layers: the table whose gradient is a matrix product, and the end of float16."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from osjax.models.layers import Embed, in_range


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16], ids=["float32", "bfloat16"])
def test_rows_and_their_gradient_are_those_of_a_lookup(dtype):
    """Against float32 throughout. In bfloat16 the weights agree, so only the sum's rounding to it differs: 2^-8."""
    ours = Embed(7, 5, dtype=dtype, param_dtype=dtype, rngs=nnx.Rngs(0))
    ids = jax.random.randint(jax.random.key(1), (4, 30), 0, 6)
    weight = jax.random.normal(jax.random.key(2), (4, 30, 5), dtype)

    def loss(module):
        return (module(ids).astype(jnp.float32) * weight.astype(jnp.float32)).sum()

    table = ours.embedding[...]
    theirs = jax.grad(lambda table: (table[ids] * weight.astype(jnp.float32)).sum())(table.astype(jnp.float32))
    gradient = jax.grad(loss)(ours).embedding[...]
    assert gradient.dtype == dtype
    np.testing.assert_array_equal(ours(ids), table[ids])
    np.testing.assert_allclose(gradient, theirs, rtol=1e-6 if dtype == jnp.float32 else 2**-8, atol=1e-6)
    assert not gradient[6].any()  # never looked up


def test_only_float16_is_kept_in_its_range():
    wide = jnp.array([1.0, jnp.inf, -jnp.inf, jnp.nan], jnp.float16)
    np.testing.assert_array_equal(in_range(wide), np.array([1.0, 65504, -65504, np.nan], np.float16))
    for dtype in (jnp.float32, jnp.bfloat16):
        kept = in_range(wide.astype(dtype))
        assert kept.dtype == dtype
        np.testing.assert_array_equal(kept.astype(jnp.float32), wide.astype(jnp.float32))
