"""Sizes of requests, against the specification's: frames, latents, what references give and what is kept."""

import pytest
from PIL import Image

from osjax.errors import OsjaxError
from osjax.models.dc_ae import DCAEConfig
from osjax.models.hunyuan_vae import HunyuanVAEConfig
from osjax.request import Request
from osjax.sizes import continued, read_references, shape_of

HUNYUAN = HunyuanVAEConfig()
DC_AE = DCAEConfig(use_spatial_tiling=True, use_temporal_tiling=True)


@pytest.mark.parametrize(
    ("resolution", "size", "grid"), [("256px", (192, 336), (33, 24, 42)), ("768px", (576, 1024), (33, 72, 128))]
)
def test_the_published_sizes(resolution, size, grid):
    shape = shape_of(Request(prompt="a", resolution=resolution), HUNYUAN, 2)
    assert (shape.size, (shape.grid.t, shape.grid.h, shape.grid.w)) == (size, grid)
    assert range(129)[shape.kept] == range(129)


@pytest.mark.parametrize(
    ("kind", "refs", "frames", "kept"),
    [("t2v", 0, 1, range(128)), ("i2v_head", 1, 1, range(3, 128)), ("i2v_loop", 2, 1, range(3, 125))],
)
def test_what_is_not_causal_loses_the_frames_around_a_picture(kind, refs, frames, kept):
    request = Request(prompt="a", resolution="768px", num_frames=128, cond_type=kind, refs=("a.png",) * refs)
    shape = shape_of(request, DC_AE, 1)
    assert (shape.grid.t, shape.grid.h, shape.grid.w) == (32, 18, 32)
    assert (shape.reference_frames, range(128)[shape.kept]) == (frames, kept)


@pytest.mark.parametrize(("vae", "frames"), [(HUNYUAN, 128), (DC_AE, 129)])
def test_lengths_that_a_model_does_not_have(vae, frames):
    with pytest.raises(OsjaxError, match=str(frames)):
        shape_of(Request(prompt="a", num_frames=frames), vae, 1)


@pytest.mark.parametrize(
    ("vae", "frames", "kind", "refs", "kept", "given"),
    [
        (HUNYUAN, 129, "t2v", (), range(129), 33),
        (HUNYUAN, 37, "v2v_head", ("a.mp4",), range(37), 33),
        (DC_AE, 128, "i2v_head", ("a.png",), range(3, 128), 32),
    ],
)
def test_a_continuation_is_as_long_and_keeps_what_is_new(vae, frames, kind, refs, kept, given):
    request = Request(prompt="a", num_frames=frames, cond_type=kind, refs=refs, extend=3)
    shape = shape_of(request, vae, 1)
    further = continued(shape, request, vae)
    assert range(frames)[shape.kept] == kept
    assert (further.grid, further.size, further.reference_frames) == (shape.grid, shape.size, given)
    assert (further.kind.name, range(frames)[further.kept]) == ("v2v_head", range(given, frames))


@pytest.mark.parametrize(
    ("vae", "options", "message"),
    [
        (HUNYUAN, {"num_frames": 1}, "an image cannot be extended: leave out --extend"),
        (HUNYUAN, {"num_frames": 33}, "num_frames is 33: .* ask for more than 33"),
        (DC_AE, {"num_frames": 32}, "num_frames is 32: .* ask for more than 32"),
        *(
            (HUNYUAN, {"cond_type": kind, "refs": ("a",)}, f"{kind} gives how the video ends")
            for kind in ("i2v_tail", "i2v_loop", "v2v_tail", "v2v_tail_easy")
        ),
    ],
)
def test_what_cannot_be_extended(vae, options, message):
    with pytest.raises(OsjaxError, match=message):
        shape_of(Request(prompt="a", extend=1, **options), vae, 1)


def test_references_are_read_in_the_requests_size_and_a_single_frame_takes_none(tmp_path):
    path = str(tmp_path / "a.png")
    Image.new("RGB", (50, 40)).save(path)
    options = {"prompt": "a", "refs": (path,), "cond_type": "i2v_loop", "resolution": None, "height": 32, "width": 48}
    request = Request(num_frames=5, **options)
    assert [clip.shape for clip in read_references(request, shape_of(request, HUNYUAN, 2))] == [(1, 32, 48, 3)] * 2
    request = Request(num_frames=1, **options)
    assert read_references(request, shape_of(request, HUNYUAN, 2)) == []
