"""8-bit projections against the bounds of their formats, and whole models against themselves."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from osjax.errors import OsjaxError
from osjax.kernels.attention_ref import reference_attention
from osjax.models import lora
from osjax.models.mmdit import MMDiT, MMDiTConfig
from osjax.models.projections import at, projections
from osjax.models.quantized import PRECISIONS, QuantizedLinear, checked, quantizable, quantize, rounded
from osjax.models.rope import rope_table

SMALL = MMDiTConfig(
    in_channels=8,
    vec_in_dim=8,
    context_in_dim=8,
    hidden_size=64,
    num_heads=2,
    depth=2,
    depth_single_blocks=3,
    axes_dim=(8, 12, 12),
)
# Half the distance of neighbours. e4m3 has 3 bits behind the point, and below 2⁻⁶ a fixed distance of 2⁻⁹; of its
# largest number, 448, that is 2⁻¹⁰ / 448. int8: half a step of 1 / 127.
RELATIVE = {"fp8": 2.0**-4, "int8": 0.0}
ABSOLUTE = {"fp8": 2.0**-10 / 448, "int8": 0.5 / 127}
EPSILON = 1e-5  # float32 sums of at most a few hundred terms

quantized = jax.jit(quantize, static_argnums=1)


@functools.cache
def model(dtype: str = "float32") -> MMDiT:
    return jax.jit(lambda: MMDiT(SMALL, rngs=nnx.Rngs(0), dtype=jnp.dtype(dtype)))()


@jax.jit
def velocity(model: MMDiT) -> jax.Array:
    shapes = (2, 6, 8), (2, 3, 8), (2, 8), (2, 6, SMALL.cond_channels)
    keys = jax.random.split(jax.random.key(1), len(shapes))
    img, txt, vec, cond = (jax.random.normal(key, shape) for key, shape in zip(keys, shapes, strict=True))
    rope = rope_table(np.indices((1, 2, 3)).reshape(3, 1, 6).transpose(1, 2, 0), SMALL.axes_dim, SMALL.theta)
    return model(img, txt, vec, jnp.array([0.3, 0.8]), rope, reference_attention, cond)


@pytest.mark.parametrize("precision", PRECISIONS)
@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**31), exponent=st.integers(-30, 30), spread=st.floats(0, 4))
def test_rounding_stays_within_the_format(precision, seed, exponent, spread):
    """Rows of very different sizes, and numbers within a row, are each as exact as the format allows."""
    rng = np.random.default_rng(seed)
    x = rng.normal(0, 1, (5, 33)) * np.exp(spread * rng.normal(0, 1, (5, 33))) * 2.0**exponent
    x[rng.integers(5)] = 0
    x = x.astype(np.float32)
    values, scale = (np.asarray(each, np.float64) for each in jax.tree.leaves(rounded(x, PRECISIONS[precision])))
    assert np.isfinite(values).all()
    most = np.abs(x).max(axis=1, keepdims=True)
    allowed = np.abs(x) * (RELATIVE[precision] + EPSILON) + most * (ABSOLUTE[precision] + EPSILON)
    assert (np.abs(values * scale[:, None] - x) <= allowed).all()


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**31), exponent=st.integers(-20, 20), spread=st.floats(0, 3), bias=st.booleans())
def test_no_result_exceeds_its_bound(seed, exponent, spread, bias):
    rng = np.random.default_rng(seed)
    x, kernel = (
        jnp.asarray(rng.normal(0, 1, shape) * np.exp(spread * rng.normal(0, 1, shape)), jnp.float32)
        for shape in ((5, 33), (7, 33))
    )
    x = x.at[1].set(0) * 2.0**exponent
    own = jnp.asarray(rng.normal(0, 1, 7), jnp.float32) if bias else None
    linear, rows = QuantizedLinear(rounded(kernel, PRECISIONS["fp8"]), own), rounded(x, PRECISIONS["fp8"])
    results = jnp.abs(linear.of_rounded(rows, jnp.float32))
    assert (results.max(axis=-1) <= linear.bound(rows) * (1 + EPSILON)).all()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_not_rounded_away(precision, bad):
    """So that drawing with it is refused, and not done with zeros; rows beside it are as they were."""
    values, scale = rounded(jnp.array([[1.0, bad, 0.5], [1.0, 2.0, 0.5]]), PRECISIONS[precision])
    again = np.asarray(values.astype(jnp.float32) * scale[:, None])
    assert not np.isfinite(again[0]).all()
    assert np.isfinite(again[1]).all()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_smallest_numbers_stay_finite(precision):
    values, scale = rounded(jnp.array([[0.0, 1e-44, -1e-40]]), PRECISIONS[precision])
    again = np.asarray(values.astype(jnp.float32) * scale[:, None])
    np.testing.assert_allclose(again, 0, atol=1e-37)


@pytest.mark.parametrize(("capability", "has"), [("8.6", False), ("8.9", True), ("9.0", True), ("12.0", True)])
def test_fp8_is_for_cards_that_have_it(capability, has):
    card = types.SimpleNamespace(compute_capability=capability)
    assert checked("int8", card) == "int8"
    if has:
        assert checked("fp8", card) == "fp8"
    else:
        with pytest.raises(OsjaxError, match="use --precision int8"):
            checked("fp8", card)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["single_blocks.qkv.lin", "double_blocks.txt.mlp_out"])
def test_a_projection_is_within_the_sum_of_its_terms_errors(precision, name):
    """|Σ xw − Σ x'w'| ≤ Σ |x||w| · (2r + r²) and the share of what is below the format's smallest numbers."""
    small = quantized(model(), precision)
    layer = functools.partial(jax.tree.map, lambda leaf: leaf[1])
    exact, small = layer(at(model(), name)), layer(at(small, name))
    assert isinstance(small, QuantizedLinear)
    x = jax.random.normal(jax.random.key(3), (4, 7, exact.kernel.shape[0])) * 3
    y, kernel = np.asarray(small(x), np.float64), np.asarray(exact.kernel[...], np.float64)
    x = np.asarray(x, np.float64)
    expected = np.tensordot(x, kernel, 1) + np.asarray(exact.bias[...])
    terms = np.tensordot(np.abs(x), np.abs(kernel), 1)
    x_error, r = (ABSOLUTE[precision] if precision == "fp8" else 0), RELATIVE[precision]
    of_weights = np.abs(x).sum(-1).reshape(4, 7, *[1] * (kernel.ndim - 1)) * np.abs(kernel).max(0)
    of_rows = np.abs(x).max(-1).reshape(4, 7, *[1] * (kernel.ndim - 1)) * np.abs(kernel).sum(0)
    allowed = terms * (2 * r + r * r + EPSILON) + 1.1 * (ABSOLUTE[precision] * of_weights + x_error * of_rows)
    assert (np.abs(y - expected) <= allowed).all()
    assert np.abs(y - expected).max() > 0


@pytest.mark.parametrize(("precision", "tolerance"), [("fp8", 0.06), ("int8", 0.015)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_model_says_nearly_the_same(precision, tolerance, dtype):
    """Root mean square of the change, of that of the output. A projection of random terms is off by √2 · 2⁻⁴/√3 · ¾ ≈
    4 % in fp8 and 1 % in int8, and residual streams are the sum of ten of them and of what came in; bf16 adds some
    0.4 %."""
    exact, small = velocity(model(dtype)), velocity(quantized(model(dtype), precision))
    assert small.dtype == jnp.dtype(dtype)
    exact, small = (np.asarray(each, np.float32) for each in (exact, small))
    assert 1e-4 < np.sqrt(np.mean((small - exact) ** 2) / np.mean(exact**2)) < tolerance


@pytest.mark.parametrize("precision", PRECISIONS)
def test_only_the_blocks_projections_are_small(precision):
    before, small = model("bfloat16"), quantized(model("bfloat16"), precision)
    names = quantizable(before)
    assert {name.split(".")[-1] for name in names} == {"lin", "proj", "mlp_in", "mlp_out", "out"}
    assert not any("mod." in name for name in names)
    for name in projections(before).keys() - set(names):
        assert at(small, name).kernel.dtype == jnp.bfloat16
    for name in names:
        assert at(small, name).kernel.dtype == PRECISIONS[precision]
        assert at(small, name).kernel.size == at(before, name).kernel.size
    assert set(projections(small)) == projections(before).keys() - set(names)
    assert isinstance(at(before, names[0]), nnx.Linear | nnx.LinearGeneral)  # the original is as it was


def test_a_merged_lora_is_rounded_with_the_weights():
    adapter = lora.init(model(), 2, 2.0, ("proj", "qkv.lin"), jax.random.key(0))
    adapter = jax.tree.map(lambda each: jnp.full_like(each, 0.3), adapter)
    merged = lora.merge(model(), adapter)
    exact, small = velocity(merged), velocity(quantized(merged, "int8"))
    plain = velocity(model())
    assert np.abs(small - exact).max() < 0.2 * np.abs(plain - exact).max()
