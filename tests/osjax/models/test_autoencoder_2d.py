"""FLUX's image autoencoder: frames by themselves, sampling, sizes and errors; numbers are in tests/parity."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from osjax.errors import OsjaxError
from osjax.models.autoencoder_2d import Autoencoder2D, Autoencoder2DConfig

TINY = Autoencoder2DConfig(z_channels=2, ch=32, ch_mult=(1, 1), num_res_blocks=1)
TOLERANCE = 1e-5  # float32, the same sums in another order


@pytest.fixture(scope="module")
def model():
    return Autoencoder2D(TINY, rngs=nnx.Rngs(0))


def random(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(1), shape)


def test_published_size():
    model = nnx.eval_shape(lambda: Autoencoder2D(Autoencoder2DConfig(), rngs=nnx.Rngs(0), dtype=jnp.bfloat16))
    leaves = jax.tree.leaves(model)
    assert sum(leaf.size for leaf in leaves) == 83_819_683
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.bfloat16)}
    x = jax.ShapeDtypeStruct((1, 1, 576, 1024, 3), jnp.float32)
    z = jax.eval_shape(lambda m, x: m.encode(x), model, x)
    assert (z.shape, z.dtype) == ((1, 1, 72, 128, 16), jnp.bfloat16)
    assert jax.eval_shape(lambda m, z: m.decode(z), model, z).shape == x.shape


def test_frames_know_nothing_of_each_other(model):
    x = random(2, 2, 6, 4, 3)
    z = model.encode(x)
    assert z.shape == (2, 2, 3, 2, 2)
    np.testing.assert_allclose(z[1:, 1:], model.encode(x[1:, 1:]), atol=TOLERANCE)
    np.testing.assert_allclose(model.decode(z)[:1, 1:], model.decode(z[:1, 1:]), atol=TOLERANCE)


def test_a_row_and_a_column_too_many_are_left_out_of_the_size(model):
    assert model.encode(random(1, 1, 5, 7, 3)).shape == (1, 1, 2, 3, 2)


def test_encode_shifts_and_scales_the_mode_or_a_sample(model):
    x, key = random(1, 1, 4, 4, 3), jax.random.key(3)
    mean, logvar = jnp.split(model.moments(x), 2, axis=-1)
    np.testing.assert_allclose(model.encode(x), 0.3611 * (mean - 0.1159), atol=TOLERANCE)
    sample = mean + jnp.exp(logvar / 2) * jax.random.normal(key, mean.shape)
    np.testing.assert_allclose(model.encode(x, key), 0.3611 * (sample - 0.1159), atol=TOLERANCE)


def test_progress_counts_frames(model):
    seen = []
    model.decode(random(1, 3, 1, 1, 2), lambda done, total: seen.append((done, total)))
    assert seen == [(3, 3)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ch_mult": ()}, "does not split into 32 groups"),
        ({"ch": 48}, "does not split into 32 groups"),
        ({"num_res_blocks": 0}, "use 1 or more"),
        ({"scale_factor": 0}, "use another value"),
    ],
)
def test_a_config_that_makes_no_model_is_refused(changes, message):
    with pytest.raises(OsjaxError, match=message):
        dataclasses.replace(TINY, **changes)


def test_what_is_no_picture_and_no_latent_is_refused(model):
    with pytest.raises(OsjaxError, match=r"video to encode has shape .*: give \[batch, time, height, width, 3\]"):
        model.encode(random(1, 4, 4, 3))
    with pytest.raises(OsjaxError, match=r"a picture of \(1, 4\) is too small: give at least 2 rows and columns"):
        model.encode(random(1, 1, 1, 4, 3))
    with pytest.raises(OsjaxError, match=r"latent to decode has shape .*: give \[batch, time, height, width, 2\]"):
        model.decode(random(1, 1, 4, 4, 3))
