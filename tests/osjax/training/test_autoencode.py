"""The autoencoder's loss on a micro model, the scale of its latents, and the measure of its error."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from osjax.models.hunyuan_vae import HunyuanVAE, HunyuanVAEConfig
from osjax.training.autoencode import latent_scale, psnr, vae_loss
from osjax.training.options import VAEOptions
from tests.osjax.training import micro

KEY = jax.random.key(3)
FRAMES, LATENTS = 13, 4
# float32 through some ten layers, computed alone and within a larger program.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def vae():
    config = {name: value for name, value in micro.VAE.items() if name != "kind"}
    return HunyuanVAE(HunyuanVAEConfig(**config), rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def video():
    return jax.random.uniform(jax.random.key(1), (4, FRAMES, 8, 8, 3), minval=-1.0)


@functools.partial(jax.jit, static_argnums=(2, 3))
def loss_of(vae, video_bthwc, options, error):
    """(loss, numbers, latents that the decoder got) where the decoder errs by `error` everywhere."""
    got = []

    def decode(z_bthwc):
        got.append(z_bthwc)
        return video_bthwc + error

    loss, numbers = vae_loss(types.SimpleNamespace(encoder=vae.encoder, decoder=decode), video_bthwc, KEY, options)
    return loss, numbers, got[0]


@pytest.mark.parametrize("error", [0.5, -0.1])
def test_the_loss_is_the_weighted_sum_of_its_parts(vae, video, error):
    options = VAEOptions(l1_weight=3.0, l2_weight=5.0, kl_weight=0.25, given_share=0.0)
    loss, numbers, _ = loss_of(vae, video, options, error)
    assert float(loss) == pytest.approx(3 * abs(error) + 5 * error**2 + 0.25 * float(numbers["kl"]), rel=TOLERANCE)
    assert float(numbers["psnr"]) == pytest.approx(20 * np.log10(2 / abs(error)), rel=TOLERANCE)


def test_divergence_is_that_of_the_moments(vae, video):
    """Per element: (μ² + σ² − 1 − log σ²) / 2."""
    _, numbers, _ = loss_of(vae, video, VAEOptions(given_share=0.0), 0.5)
    mean, logvar = np.split(np.asarray(vae.moments(video), np.float64), 2, axis=-1)
    expected = 0.5 * (mean**2 + np.exp(logvar) - 1 - logvar).mean()
    assert expected > 0
    assert float(numbers["kl"]) == pytest.approx(expected, rel=TOLERANCE)


def test_given_frames_change_the_first_and_the_last_latent_only(vae, video):
    plain = np.asarray(loss_of(vae, video, VAEOptions(given_share=0.0), 0.5)[2])
    given = np.asarray(loss_of(vae, video, VAEOptions(given_share=1.0), 0.5)[2])
    assert plain.shape == (4, LATENTS, 2, 2, 4)
    np.testing.assert_allclose(given[:, 1:-1], plain[:, 1:-1], atol=TOLERANCE)
    for end, frame in ((0, slice(None, 1)), (-1, slice(-1, None))):
        mean, logvar = np.split(np.asarray(vae.moments(video[:, frame]))[:, 0], 2, axis=-1)
        before, before_logvar = np.split(np.asarray(vae.moments(video))[:, end], 2, axis=-1)
        # The same noise, scaled by the deviation of the frame that was encoded alone.
        noise = (plain[:, end] - before) / np.exp(before_logvar / 2)
        np.testing.assert_allclose(given[:, end], mean + np.exp(logvar / 2) * noise, atol=1e-4)
        assert np.abs(given[:, end] - plain[:, end]).max() > 0.01


def test_each_end_of_each_clip_is_given_by_itself(vae, video):
    many = jnp.tile(video[:1], (64, 1, 1, 1, 1))
    plain, some = (np.asarray(loss_of(vae, many, VAEOptions(given_share=share), 0.5)[2]) for share in (0.0, 0.5))
    head, tail = ((np.abs(some - plain)[:, at] > 1e-4).any(axis=(1, 2, 3)) for at in (0, -1))
    # Of 64 clips; four deviations of a half are 16, of a quarter 14.
    assert 16 <= head.sum() <= 48
    assert 16 <= tail.sum() <= 48
    assert 2 <= (head & tail).sum() <= 30


def test_a_single_frame_is_always_encoded_alone(vae, video):
    none, every = (loss_of(vae, video[:, :1], VAEOptions(given_share=share), 0.5)[2] for share in (0.0, 1.0))
    np.testing.assert_array_equal(none, every)


def test_gradients_reach_every_weight(vae, video):
    def loss(vae):
        return vae_loss(vae, video, KEY, VAEOptions(kl_weight=0.1, given_share=0.5))[0]

    gradients = jax.tree.leaves(jax.jit(jax.grad(loss))(vae))
    assert gradients
    assert all(np.isfinite(each).all() for each in gradients)
    assert all(np.asarray(each).any() for each in gradients)


@pytest.mark.parametrize(("scale", "shift"), [(1.0, 0.0), (0.477, -0.3)])
def test_scaled_latents_have_mean_0_and_deviation_1(vae, video, scale, shift):
    """float32 sums over some hundred numbers."""

    def encode(**factors):
        other = jax.tree.map(lambda leaf: leaf, vae)
        other.config = HunyuanVAEConfig(**{**vars(vae.config), **factors})
        return other.encode(video)

    found = latent_scale(encode(scale_factor=scale, shift_factor=shift), scale, shift)
    assert found.keys() == {"scale_factor", "shift_factor"}
    assert all(type(value) is float for value in found.values())  # for JSON
    z = np.asarray(encode(**found), np.float64)
    assert z.mean() == pytest.approx(0, abs=1e-5)
    assert z.std() == pytest.approx(1, abs=1e-5)


@given(decibels=st.floats(0, 80))
@settings(deadline=None, max_examples=30)
def test_psnr_of_known_errors(decibels):
    """An error of the whole range, 2, is 0 dB; each factor of ten less is 20 dB more."""
    error = 2 * 10 ** (-decibels / 20)
    assert float(psnr(jnp.float32(error**2))) == pytest.approx(decibels, abs=1e-4)
