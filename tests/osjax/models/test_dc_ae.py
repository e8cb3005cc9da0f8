"""The Video DC-AE's sizes, lost frames, tiling switches and errors; numbers are in tests/parity."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from osjax.errors import OsjaxError
from osjax.models.dc_ae import DCAE, DCAEConfig, Decoder
from osjax.models.tiling import apply_tiled

TINY = DCAEConfig(
    latent_channels=4,
    **{f"{net}_widths": (8, 8, 32) for net in ("encoder", "decoder")},
    **{f"{net}_depths": (1, 1, 1) for net in ("encoder", "decoder")},
    **{f"{net}_attention": (False, False, True) for net in ("encoder", "decoder")},
    **{f"{net}_time": (True, True, False) for net in ("encoder", "decoder")},
    spatial_tile_size=16,
    temporal_tile_size=16,
)
TOLERANCE = 1e-5  # float32, the same sums in another order


def tiled(**changes: object) -> DCAEConfig:
    return DCAEConfig(use_spatial_tiling=True, use_temporal_tiling=True, **changes)


@pytest.fixture(scope="module")
def model():
    return DCAE(TINY, rngs=nnx.Rngs(0))


def random(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(1), shape)


def test_published_size():
    model = nnx.eval_shape(lambda: DCAE(tiled(), rngs=nnx.Rngs(0), dtype=jnp.bfloat16))
    leaves = jax.tree.leaves(model)
    assert sum(leaf.size for leaf in leaves) == 459_462_147
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.bfloat16)}
    x = jax.ShapeDtypeStruct((1, 40, 288, 256, 3), jnp.float32)
    z = jax.eval_shape(lambda m, x: m.encode(x), model, x)
    assert (z.shape, z.dtype) == ((1, 10, 9, 8, 128), jnp.bfloat16)
    assert jax.eval_shape(lambda m, z: m.decode(z), model, z).shape == x.shape
    assert (model.config.time_compression_ratio, model.config.spatial_compression_ratio) == (4, 32)


@given(st.integers(1, 140), st.booleans(), st.sampled_from([8, 16, 32]), st.sampled_from([0.0, 0.25, 0.5]))
def test_frames_that_are_not_refused_come_back(frames, temporal, size, overlap):
    """Tiles of a stand-in that has the networks' lengths; those of 8 frames, of which 2 overlap, cut latents apart."""
    config = dataclasses.replace(
        TINY, use_temporal_tiling=temporal, temporal_tile_size=size, tile_overlap_factor=overlap
    )
    try:
        latents = config.latent_frames(frames)
    except OsjaxError:
        assert frames > 1
        return
    z = apply_tiled(
        lambda x: np.zeros((1, config.shrunk(x.shape[1]), 1, 1, 1)), frame_row(frames), config.encode_tiling
    )
    assert z.shape[1] == latents
    x = apply_tiled(
        lambda z: frame_row(4 * z.shape[1] if z.shape[1] > 1 else 1), frame_row(latents), config.decode_tiling
    )
    assert x.shape[1] == frames


def frame_row(frames: int) -> np.ndarray:
    return np.zeros((1, frames, 1, 1, 1), np.float32)


@pytest.mark.parametrize(("frames", "latents"), [(1, 1), (2, 1), (4, 1), (6, 0), (7, 0), (8, 2), (20, 5)])
def test_the_encoder_has_the_lengths_that_the_config_tells(frames, latents):
    assert TINY.shrunk(frames) == latents
    if latents:
        model = nnx.eval_shape(lambda: DCAE(TINY, rngs=nnx.Rngs(0)))
        z = jax.eval_shape(lambda m, x: m.encode(x), model, jax.ShapeDtypeStruct((1, frames, 4, 4, 3), jnp.float32))
        assert z.shape == (1, latents, 1, 1, 4)
        x = jax.eval_shape(lambda m, z: m.decode(z), model, z)
        assert x.shape == (1, 4 * latents if latents > 1 else 1, 4, 4, 3)


@pytest.mark.parametrize(
    ("config", "frames", "latents"),
    [(DCAEConfig(), 128, 32), (DCAEConfig(), 1, 1), (tiled(), 128, 32), (tiled(), 32, 8), (DCAEConfig(), 28, 7)],
)
def test_clips_that_come_back(config, frames, latents):
    assert config.latent_frames(frames) == latents


@pytest.mark.parametrize(
    ("config", "frames", "instead"),
    [
        (DCAEConfig(), 4, 1),  # one latent is one frame
        (DCAEConfig(), 2, 1),
        (DCAEConfig(), 131, 132),
        (DCAEConfig(), 0, 1),
        (tiled(temporal_tile_size=16), 28, 24),  # latent tiles of 4, 4 and 1
        (tiled(), 52, 48),
    ],
)
def test_clips_that_would_lose_frames_are_refused(config, frames, instead):
    with pytest.raises(
        OsjaxError, match=rf"{frames} frames would not come back from the autoencoder: ask for {instead}$"
    ):
        config.latent_frames(frames)


def test_one_frame_is_not_resampled_in_time(model):
    z = model.encode(random(1, 1, 4, 8, 3))
    assert z.shape == (1, 1, 1, 2, 4)
    assert model.decode(z).shape == (1, 1, 4, 8, 3)


def test_latents_are_divided_by_their_scale_and_a_key_changes_nothing(model):
    x = random(1, 4, 4, 4, 3)
    z = model.encode(x)
    scaled = nnx.eval_shape(lambda: DCAE(dataclasses.replace(TINY, scaling_factor=0.5), rngs=nnx.Rngs(0)))
    scaled = jax.tree.unflatten(jax.tree.structure(scaled), jax.tree.leaves(model))
    np.testing.assert_allclose(scaled.encode(x, jax.random.key(0)), 2 * z, atol=TOLERANCE)
    np.testing.assert_allclose(scaled.decode(2 * z), model.decode(z), atol=TOLERANCE)


def test_a_tile_shape_is_traced_once_whatever_the_tiling(model, monkeypatch):
    traced, seen = [], []
    call = Decoder.__call__
    monkeypatch.setattr(Decoder, "__call__", lambda self, z: traced.append(z.shape) or call(self, z))
    z = random(1, 2, 2, 7, 4)  # one row of tiles of 4 latents every 3: widths 4, 4, 1
    wide = model.with_tiling(spatial=True, temporal=False)
    wide.decode(z, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert len(traced) == len(set(traced)) == 2
    model.decode(z[:, :, :, :4])
    assert len(traced) == 2
    assert (model.config.use_spatial_tiling, wide.config.use_spatial_tiling) == (False, True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"encoder_depths": (1, 1)}, "give one value for each stage"),
        ({"decoder_depths": (1, 0, 1)}, "give each at least one"),
        ({"encoder_attention": (True, False, True)}, "no room for a head: use 32 channels"),
        ({"latent_channels": 5}, "use a divisor of it"),
        ({"decoder_widths": (8, 12, 32)}, "let the second divide 4 times the first"),
        ({"encoder_time": (True, False, False)}, "give both the same stages"),
        ({"scaling_factor": 0}, "use another value"),
        ({"temporal_tile_size": 2, "use_temporal_tiling": True}, "choose larger tiles"),
        ({"spatial_tile_size": 3, "use_spatial_tiling": True}, "choose larger tiles"),
    ],
)
def test_a_config_that_makes_no_model_is_refused(changes, message):
    with pytest.raises(OsjaxError, match=message) as error:
        dataclasses.replace(TINY, **changes)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 4, 4, 3), r"video to encode has shape .*: give \[batch, time, height, width, 3\]"),
        ((1, 6, 4, 4, 3), "a video of 6 frames cannot be encoded: use one frame, or a multiple of 4"),
        ((1, 4, 4, 6, 3), "a video of 4 x 6 pixels cannot be encoded: use multiples of 4"),
    ],
)
def test_what_cannot_be_encoded_is_refused(model, shape, message):
    with pytest.raises(OsjaxError, match=message):
        model.encode(jnp.zeros(shape))


def test_what_is_no_latent_is_refused(model):
    with pytest.raises(OsjaxError, match=r"latent to decode has shape .*: give \[batch, time, height, width, 4\]"):
        model.decode(jnp.zeros((1, 1, 1, 1, 3)))
