"""The pipeline with an autoencoder that is not causal: lengths, sizes, references and the frames that they cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from osjax.bundle import read_bundle
from osjax.errors import OsjaxError
from osjax.media import write_mp4
from osjax.parallel.mesh import TrainingMeshShape, make_mesh
from osjax.pipeline import EMBEDDED, Pipeline
from osjax.request import Request
from osjax.residency import model_config
from osjax.training.parts import export, load_weights, open_parts

NETS = ("encoder", "decoder")
VAE = {
    "kind": "dc_ae",
    "latent_channels": 4,
    **{f"{net}_widths": (8, 8, 8, 8, 16, 32) for net in NETS},
    **{f"{net}_depths": (1, 1, 1, 1, 1, 1) for net in NETS},
    **{f"{net}_attention": (False, False, False, False, False, True) for net in NETS},
    "use_spatial_tiling": True,
    "use_temporal_tiling": True,
    "spatial_tile_size": 128,
    "temporal_tile_size": 16,
}
MMDIT = {
    "kind": "mmdit",
    "in_channels": 4,
    "patch_size": 1,
    "hidden_size": 24,
    "num_heads": 2,
    "depth": 1,
    "depth_single_blocks": 1,
    "axes_dim": (4, 4, 4),
}
SMALL = {"resolution": None, "aspect_ratio": None, "height": 32, "width": 48, "num_frames": 8, "num_steps": 2}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "bundle"
    t5, clip = (model_config(read_bundle(EMBEDDED).component(name)) for name in ("t5", "clip"))
    mmdit = MMDIT | {"context_in_dim": t5.d_model, "vec_in_dim": clip.hidden_size}
    parts = open_parts(str(EMBEDDED), {"mmdit": mmdit, "vae": VAE}, ("mmdit", "vae"), jnp.float32)
    trained, frozen = load_weights(parts, make_mesh(TrainingMeshShape()), jax.random.key(0))
    export(parts, trained | frozen, folder, {}, jnp.float32)
    return Pipeline.load(folder, dtype="fp32", progress=False)


@pytest.fixture(scope="module")
def refs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("refs")
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (40, 60, 3), np.uint8)).save(folder / "picture.png")
    write_mp4(folder / "clip.mp4", rng.integers(0, 255, (32, 48, 64, 3), np.uint8), 24)
    return folder


def request(**options) -> Request:
    return Request("a cat", **(SMALL | options))


def test_a_free_size_grows_to_whole_latents(pipeline):
    """48 columns are one latent and a half; upstream rounds sizes up to 16 and latents up to 32."""
    shape = pipeline.shape(request())
    assert (shape.size, shape.grid.t, shape.grid.h, shape.grid.w) == ((32, 64), 2, 1, 2)
    video = pipeline(request())
    assert video.frames.shape == (8, 32, 64, 3)
    assert video.provenance.num_frames == 8


def test_a_single_frame(pipeline):
    assert pipeline(request(num_frames=1)).frames.shape == (1, 32, 64, 3)


def test_the_published_size(pipeline):
    shape = pipeline.shape(request(resolution="768px", aspect_ratio="16:9", num_frames=128))
    assert (shape.size, shape.grid.tokens, shape.kept) == ((576, 1024), 18_432, slice(0, 128))


@pytest.mark.parametrize(
    ("cond_type", "given", "frames", "kept"),
    [
        ("i2v_head", "picture.png", 8, 5),  # the latent of an image is decoded to four frames
        ("i2v_tail", "picture.png", 8, 5),
        ("i2v_loop", "picture.png", 12, 6),
        ("v2v_head", "clip.mp4", 44, 44),
    ],
)
def test_references(pipeline, refs, cond_type, given, frames, kept):
    video = pipeline(request(cond_type=cond_type, refs=(str(refs / given),), num_frames=frames))
    assert video.frames.shape == (kept, 32, 64, 3)
    assert video.provenance.num_frames == kept


def test_a_video_that_goes_on(pipeline, refs):
    """Its last 32 frames are given, as v2v_head has them here."""
    options = {"cond_type": "i2v_head", "refs": (str(refs / "picture.png"),), "num_frames": 44}
    video = pipeline(request(extend=1, **options))
    assert video.frames.shape == (41 + 12, 32, 64, 3)
    assert video.provenance.num_frames == 53
    np.testing.assert_array_equal(video.frames[:41], pipeline(request(**options)).frames)


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        (9, "9 frames cannot be drawn .*: ask for 8"),
        (4, "4 frames would not come back from the autoencoder: ask for 1"),
        (28, "28 frames would not come back from the autoencoder: ask for 24"),
    ],
)
def test_lengths_that_cannot_be_drawn(pipeline, frames, message):
    with pytest.raises(OsjaxError, match=message):
        pipeline.shape(request(num_frames=frames))


def test_a_causal_autoencoder_takes_no_4k_frames():
    with pytest.raises(OsjaxError, match=r"8 frames cannot be drawn \(4k\+1 frames"):
        Pipeline.load(dtype="fp32", progress=False).shape(request())
