"""The Hunyuan VAE's arrangement, causality, tiling switches, sampling and errors; numbers are in tests/parity."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from osjax.errors import OsjaxError
from osjax.models import resnet_vae
from osjax.models.hunyuan_vae import HunyuanVAE, HunyuanVAEConfig
from osjax.models.resnet_vae import Decoder

TINY = HunyuanVAEConfig(
    latent_channels=2,
    block_out_channels=(4, 4, 8),
    layers_per_block=1,
    norm_num_groups=2,
    spatial_compression_ratio=4,
    sample_size=16,
    sample_tsize=16,
)
TOLERANCE = 1e-5  # float32, the same sums in another order


def build(config: HunyuanVAEConfig = TINY, dtype=jnp.float32) -> HunyuanVAE:
    """A model of random kernels that keep the variance; drawn by NumPy, which needs no compilation."""
    rng = np.random.default_rng(0)

    def draw(leaf):
        fan_in = np.prod(leaf.shape[:-1])
        mean, deviation = (0, fan_in**-0.5) if leaf.ndim > 1 else (0.5, 0.2)
        return jnp.asarray(mean + deviation * rng.standard_normal(leaf.shape), leaf.dtype)

    return jax.tree.map(draw, nnx.eval_shape(lambda: HunyuanVAE(config, rngs=nnx.Rngs(0), dtype=dtype)))


@pytest.fixture(scope="module")
def vae():
    return build()


def random(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(1), shape)


def test_published_size():
    model = nnx.eval_shape(lambda: HunyuanVAE(HunyuanVAEConfig(), rngs=nnx.Rngs(0), dtype=jnp.bfloat16))
    leaves = jax.tree.leaves(model)
    assert sum(leaf.size for leaf in leaves) == 246_478_803
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.bfloat16)}
    x = jax.ShapeDtypeStruct((1, 5, 192, 336, 3), jnp.float32)
    z = jax.eval_shape(lambda m, x: m.encode(x), model, x)
    assert (z.shape, z.dtype) == ((1, 2, 24, 42, 16), jnp.bfloat16)
    assert jax.eval_shape(lambda m, z: m.decode(z), model, z).shape == x.shape


@pytest.mark.parametrize(
    ("time", "space", "levels", "expected"),
    [
        (4, 8, 4, [(1, 2, 2), (2, 2, 2), (2, 2, 2), (1, 1, 1)]),
        (8, 8, 4, [(2, 2, 2), (2, 2, 2), (2, 2, 2), (1, 1, 1)]),
        (4, 8, 5, [(1, 2, 2), (1, 2, 2), (2, 2, 2), (2, 1, 1), (1, 1, 1)]),
        (4, 16, 4, [(1, 2, 2), (2, 2, 2), (2, 2, 2), (1, 2, 2)]),
        (4, 4, 2, [(2, 2, 2), (1, 2, 2)]),
        (8, 1, 1, [(1, 1, 1)]),
    ],
)
def test_where_levels_resample(time, space, levels, expected):
    config = HunyuanVAEConfig(
        time_compression_ratio=time,
        spatial_compression_ratio=space,
        block_out_channels=(32,) * levels,
        use_spatial_tiling=False,
    )
    assert list(config.level_factors) == expected


@pytest.mark.parametrize(
    "changes",
    [
        {"time_compression_ratio": 8, "spatial_compression_ratio": 8, "block_out_channels": (4, 4, 4, 8)},
        {"mid_block_add_attention": False, "act_fn": "gelu", "in_channels": 1, "out_channels": 2},
        {"block_out_channels": (4, 8, 4, 6, 2), "layers_per_block": 2, "spatial_compression_ratio": 8},
    ],
)
def test_other_arrangements_have_the_shapes_of_their_ratios(changes):
    config = dataclasses.replace(TINY, use_spatial_tiling=False, **changes)
    ratio = config.spatial_compression_ratio
    model = nnx.eval_shape(lambda: HunyuanVAE(config, rngs=nnx.Rngs(0)))
    x = jax.ShapeDtypeStruct((2, 17, 2 * ratio, 3 * ratio, config.in_channels), jnp.float32)
    z = jax.eval_shape(lambda m, x: m.encode(x), model, x)
    assert z.shape == (2, 1 + 16 // config.time_compression_ratio, 2, 3, 2)
    assert jax.eval_shape(lambda m, z: m.decode(z), model, z).shape == (*x.shape[:-1], config.out_channels)


class NoNorm(nnx.Module):
    def __call__(self, x):
        return x

    def fitted(self, _):
        return self


@pytest.fixture(scope="module")
def without_norms():
    """Group norms average over time, all else is causal: so causality shows in a model whose norms do nothing."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resnet_vae, "group_norm", lambda *args, **kwargs: NoNorm())
        return build()


def test_later_frames_do_not_change_earlier_latents(without_norms):
    x = random(1, 13, 8, 8, 3)
    z = without_norms.encode(x)
    for frame in (4, 5, 8, 12):  # frames 1 to 4 make latent 1, 5 to 8 latent 2
        changed = without_norms.encode(x.at[:, frame].add(1.0))
        first = -(-frame // 4)
        np.testing.assert_allclose(changed[:, :first], z[:, :first], atol=1e-6)
        assert np.abs(changed[:, first] - z[:, first]).max() > 1e-3


def test_later_latents_do_not_change_earlier_frames(without_norms):
    z = random(1, 4, 2, 2, 2)
    video = without_norms.decode(z)
    assert video.shape == (1, 13, 8, 8, 3)
    for latent in (1, 3):
        changed = without_norms.decode(z.at[:, latent].add(1.0))
        first = 4 * latent - 3
        np.testing.assert_allclose(changed[:, :first], video[:, :first], atol=1e-6)
        assert np.abs(changed[:, first] - video[:, first]).max() > 1e-3


def test_tiling_switches_share_arrays_and_leave_the_model_alone(vae):
    other = vae.with_tiling(spatial=False, temporal=True)
    assert (other.config.use_spatial_tiling, other.config.use_temporal_tiling) == (False, True)
    assert vae.config == TINY
    for mine, theirs in zip(jax.tree.leaves(vae), jax.tree.leaves(other), strict=True):
        assert mine is theirs


def test_a_tile_shape_is_traced_once_whatever_the_tiling(vae, monkeypatch):
    traced = []
    call = Decoder.__call__
    monkeypatch.setattr(Decoder, "__call__", lambda self, z: traced.append(z.shape) or call(self, z))
    z = random(1, 2, 4, 11, 2)  # tiles of 4 latents every 3: widths 4, 4, 4, 2 in one row of 4, then a row of 1
    seen = []
    vae.decode(z, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i, 8) for i in range(1, 9)]
    assert len(traced) == len(set(traced)) == 4
    vae.with_tiling(spatial=False, temporal=False).decode(z[:, :, :, :4])
    assert len(traced) == 4


def test_methods_can_be_jitted(vae):
    z = random(1, 2, 2, 3, 2)
    np.testing.assert_allclose(jax.jit(lambda m, z: m.decode(z))(vae, z), vae.decode(z), atol=TOLERANCE)


def test_slicing_gives_the_same(vae):
    sliced = build(dataclasses.replace(TINY, use_slicing=True))
    z = random(2, 2, 2, 3, 2)
    np.testing.assert_allclose(sliced.decode(z), vae.decode(z), atol=TOLERANCE)


def test_encode_scales_the_mode_or_a_sample(vae):
    x, key = random(2, 1, 8, 8, 3), jax.random.key(3)
    mean, logvar = jnp.split(vae.moments(x), 2, axis=-1)
    scale = TINY.scale_factor
    np.testing.assert_allclose(vae.encode(x), scale * mean, atol=TOLERANCE)
    sample = mean + jnp.exp(logvar / 2) * jax.random.normal(key, mean.shape)
    np.testing.assert_allclose(vae.encode(x, key), scale * sample, atol=TOLERANCE)


def test_log_variance_is_clamped_when_sampling():
    model = build(dataclasses.replace(TINY, scale_factor=2.0, shift_factor=0.5))
    bias = model.encoder.quant_conv.bias
    bias[...] = bias[...].at[2:].set(1000.0)
    x, key = random(1, 1, 4, 4, 3), jax.random.key(3)
    noise = model.encode(x, key) - model.encode(x)
    np.testing.assert_allclose(noise, 2.0 * np.exp(10.0) * jax.random.normal(key, noise.shape), rtol=1e-4)
    np.testing.assert_allclose(model.encode(x), 2.0 * (jnp.split(model.moments(x), 2, -1)[0] - 0.5), atol=TOLERANCE)


def test_bfloat16_stays_near_float32(vae):
    z = random(1, 2, 2, 3, 2)
    video, reference = build(dtype=jnp.bfloat16).decode(z), vae.decode(z)
    assert video.dtype == jnp.bfloat16
    error = np.abs(video.astype(jnp.float32) - reference).max() / np.abs(reference).max()
    assert error < 0.1  # some twenty layers, each rounded to 8 bits


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"time_compression_ratio": 2}, "use 4 or 8"),
        ({"spatial_compression_ratio": 6}, "use a power of two"),
        ({"block_out_channels": ()}, "use multiples of norm_num_groups"),
        ({"block_out_channels": (4, 5, 8)}, "use multiples of norm_num_groups"),
        ({"act_fn": "sine"}, "use one of silu"),
        ({"scale_factor": 0}, "use another value"),
        ({"sample_size": 3}, "choose larger tiles"),
        ({"tile_overlap_factor": 1.0}, "choose larger tiles"),
        ({"sample_tsize": 2, "use_temporal_tiling": True}, "choose larger tiles"),
    ],
)
def test_a_config_that_makes_no_model_is_refused(changes, message):
    with pytest.raises(OsjaxError, match=message) as error:
        dataclasses.replace(TINY, **changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("shape", [(1, 8, 8, 3), (1, 1, 8, 8, 4), (1, 0, 8, 8, 3)])
def test_what_is_no_video_is_refused(vae, shape):
    for method in (vae.encode, vae.moments):
        with pytest.raises(OsjaxError, match=r"video to encode has shape .*: give \[batch, time, height, width, 3\]"):
            method(jnp.zeros(shape))


@pytest.mark.parametrize("shape", [(2, 2, 2), (1, 1, 2, 2, 3), (1, 1, 0, 2, 2)])
def test_what_is_no_latent_is_refused(vae, shape):
    with pytest.raises(OsjaxError, match=r"latent to decode has shape .*: give \[batch, time, height, width, 2\]"):
        vae.decode(jnp.zeros(shape))
