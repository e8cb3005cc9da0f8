"""The pipeline on the embedded bundle: batches, meshes and offloading change nothing; what cannot be drawn is said."""

import logging
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from osjax import room
from osjax.errors import OsjaxError
from osjax.parallel.mesh import make_mesh, parse_mesh
from osjax.pipeline import Pipeline
from osjax.request import Request
from osjax.residency import Residency

SMALL = {"resolution": None, "aspect_ratio": None, "height": 32, "width": 48, "num_frames": 5, "num_steps": 3}


def request(prompt="a red circle stands still on a teal background", **options) -> Request:
    return Request(prompt, **(SMALL | options))


def load(**options) -> Pipeline:
    return Pipeline.load(dtype="fp32", progress=False, **options)


@pytest.fixture(scope="module")
def pipeline() -> Pipeline:
    return load()


@pytest.fixture(scope="module")
def alone(pipeline):
    return pipeline(request())


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("refs") / "picture.png"
    pixels = np.random.default_rng(0).integers(0, 255, (40, 60, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return str(path)


def assert_same_frames(actual, expected) -> None:
    """Float32 sums in another order may move a value over a rounding edge: one level, in one of a thousand pixels."""
    difference = np.abs(actual.frames.astype(int) - expected.frames.astype(int))
    assert difference.max() <= 1
    assert (difference > 0).mean() <= 1e-3


def test_a_video(alone):
    assert alone.frames.shape == (5, 32, 48, 3)
    assert alone.frames.dtype == np.uint8
    assert alone.frames.std() > 10
    told = alone.provenance
    assert told.prompt_used == "a red circle stands still on a teal background. 24 FPS. 4 motion score."
    assert (told.num_frames, told.height, told.width, told.steps) == (5, 32, 48, 3)
    assert told.forward_passes == 6
    assert set(told.seconds) == {"text", "references", "denoise", "decode"}


def test_a_batch_draws_what_each_would_be_alone(pipeline, alone):
    first, second = pipeline.run([request(), request("a blue square grows on a brown background", seed=3)])
    assert_same_frames(first, alone)
    assert_same_frames(second, pipeline(request("a blue square grows on a brown background", seed=3)))
    assert (first.frames != second.frames).any()


def test_prompt_and_seed_both_matter(pipeline, alone):
    assert (pipeline(request(seed=1)).frames != alone.frames).any()
    assert (pipeline(request("a white star moves up on a navy background")).frames != alone.frames).any()


@pytest.mark.parametrize("mesh", ["seq=4", "data=2,seq=4", "data=8"])
def test_every_mesh_draws_the_same(alone, mesh):
    assert_same_frames(load(mesh=mesh)(request()), alone)


def test_offload_draws_the_same(alone):
    pipeline = load(offload=True)
    np.testing.assert_array_equal(pipeline(request()).frames, alone.frames)
    np.testing.assert_array_equal(pipeline(request()).frames, alone.frames)  # the second time from host memory


def test_offload_draws_the_same_from_a_picture(pipeline, picture):
    """The transformer may come while the picture is encoded."""
    asked = request(cond_type="i2v_head", refs=(picture,))
    np.testing.assert_array_equal(load(offload=True)(asked).frames, pipeline(asked).frames)


@pytest.mark.parametrize("mesh", ["data=1,seq=1", "data=2,seq=2"])
def test_blocks_that_come_one_by_one_draw_the_same(alone, mesh):
    pipeline = load(offload=True, offload_blocks=True, mesh=mesh)
    for _ in range(2):  # from disk, then from host memory
        video = pipeline(request())
        assert_same_frames(video, alone)
        assert video.provenance.in_blocks
        assert video.provenance.forward_passes == alone.provenance.forward_passes
    assert not alone.provenance.in_blocks


@pytest.mark.parametrize("offload", [False, True])
def test_a_transformer_in_parts_draws_the_same(pipeline, alone, offload):
    """As GPUs have it: what one draws whose blocks come one by one, by the same programs, and so to the bit."""
    mesh = make_mesh(parse_mesh("data=1,seq=2"))
    residency = Residency(pipeline.bundle, mesh, jnp.float32, offload=offload, in_parts=True)
    in_parts = Pipeline.over(residency, mesh, "fp32", "auto", "tiny", progress=False)
    assert_same_frames(in_parts(request()), alone)
    cut = request(speed="balanced", num_steps=6)
    one_by_one = load(offload=True, offload_blocks=True, mesh="data=1,seq=2")(cut)
    for _ in range(2):
        np.testing.assert_array_equal(in_parts(cut).frames, one_by_one.frames)


def test_blocks_come_one_by_one_from_a_picture_too(pipeline, picture):
    asked = request(cond_type="i2v_head", refs=(picture,), speed="fast", num_steps=6)
    assert_same_frames(load(offload=True, offload_blocks=True)(asked), pipeline(asked))


@pytest.mark.parametrize(("gigabytes", "in_blocks"), [(1000.0, False), (0.001, True)])
def test_with_offload_they_do_where_the_transformer_would_not_fit(monkeypatch, alone, gigabytes, in_blocks):
    monkeypatch.setattr(room, "least", lambda devices: room.Memory(gigabytes, gigabytes))  # CPUs do not tell
    pipeline = load(offload=True)
    assert pipeline.in_blocks([request()]) == in_blocks
    assert not load(offload=False).in_blocks([request()])
    assert not load(offload=True, offload_blocks=False).in_blocks([request()])
    video = pipeline(request())
    assert video.provenance.in_blocks == in_blocks
    assert_same_frames(video, alone)


def test_blocks_are_offloaded_with_the_rest_or_not_at_all():
    with pytest.raises(OsjaxError, match="give --offload True too"):
        load(offload=False, offload_blocks=True)


def test_a_reference_shows_in_the_first_frame(pipeline, picture):
    video = pipeline(request(cond_type="i2v_head", refs=(picture,)))
    assert video.provenance.refs[0].name == "picture.png"
    assert video.provenance.forward_passes == 9


def test_posterior_samples_follow_the_seed(pipeline, picture):
    shape = pipeline.shape(request())
    clip = np.zeros((1, *shape.size, 3), np.float32)
    options = {"cond_type": "i2v_head", "refs": (picture,)}

    def encode(**more):
        return np.asarray(pipeline.encode_references(request(**options, **more), [clip])[0])

    np.testing.assert_array_equal(encode(sample_posterior=True), encode(sample_posterior=True))
    assert (encode(sample_posterior=True) != encode(sample_posterior=True, seed=1)).any()
    assert (encode(sample_posterior=True) != encode()).any()


def test_a_single_frame_ignores_references(pipeline, picture):
    image = pipeline(request(num_frames=1, cond_type="i2v_head", refs=(picture,)))
    assert image.frames.shape == (1, 32, 48, 3)


def test_a_long_prompt_is_cut_with_a_warning(pipeline, caplog):
    with caplog.at_level(logging.WARNING):
        pipeline.encode_text(["word " * 500])
    assert f"over {pipeline.bundle.component('t5').max_length} tokens" in caplog.text


def test_requests_of_different_shapes_do_not_go_together(pipeline):
    with pytest.raises(ValueError, match="drawn together"):
        pipeline.run([request(), request(num_steps=4)])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cond_type": "i2v_haed"}, "did you mean i2v_head"),
        ({"cond_type": "i2v_head"}, "takes 1 reference"),
        ({"cond_type": "i2v_head", "refs": ("missing.png",)}, "missing.png"),
        ({"resolution": "256px", "aspect_ratio": "7:5"}, "no aspect ratio"),
        ({"resolution": "huge", "aspect_ratio": "1:1"}, "unknown resolution"),
        ({"height": 0}, "is empty"),
        ({"extend": 1}, "ask for more than 33"),
        ({"guidance": 1e38}, "not finite.*: nothing was saved"),
    ],
)
def test_what_cannot_be_drawn(pipeline, options, message):
    with pytest.raises(OsjaxError, match=message):
        pipeline(request(**options))


def test_a_request_that_fills_the_device_is_told_what_it_needs(monkeypatch):
    pipeline = load()
    too_much = jax.jit(lambda: jnp.zeros((1 << 45,)))
    monkeypatch.setattr(pipeline.residency, "on_device", lambda name: jax.block_until_ready(too_much()))
    with pytest.raises(
        OsjaxError, match=r"memory is full: decode \(VAE\) needs .* GB on each device.*--offload True needs"
    ):
        pipeline(request())


@pytest.mark.parametrize(
    "options",
    [
        {"dtype": "int4"},
        {"precision": "int4"},
        {"mesh": "rows=2"},
        {"mesh": "seq=64"},
        {"attention": "flash"},
        {"attention": "cudnn"},
    ],
)
def test_what_cannot_be_loaded(options):
    with pytest.raises(OsjaxError, match=next(iter(options.values())).split("=")[0]):
        Pipeline.load(**({"dtype": "fp32"} | options))


def test_a_request_takes_what_the_bundle_asks_for_and_what_is_said():
    pipeline = types.SimpleNamespace(bundle=types.SimpleNamespace(settings={"num_frames": 33, "num_steps": 30}))
    asked = Pipeline.request(pipeline, prompt="a cat", num_steps=4)
    assert asked == Request(prompt="a cat", num_frames=33, num_steps=4)


@pytest.mark.parametrize(
    "options",
    [
        {"prompt": "  "},
        {"guidance": float("nan")},
        {"guidance_img": float("inf")},
        {"seed": -1},
        {"seed": 2**32},
        {"num_frames": 6},
        {"num_frames": 133},
        {"extend": -1},
        {"num_steps": 0},
        {"fps": 0},
        {"motion_score": "dynamic"},
        {"flow_shift": 0.0},
        {"width": None},
        {"resolution": "256px"},
    ],
)
def test_requests_that_cannot_be(options):
    with pytest.raises(OsjaxError):
        request(**options)
