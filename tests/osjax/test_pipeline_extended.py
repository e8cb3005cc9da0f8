"""Videos continued from their last frames: each piece is the v2v_head video of the same frames, and nothing doubled."""

import av
import numpy as np
import pytest
from PIL import Image

from osjax.pipeline import Pipeline
from osjax.request import Request, continuation_seed

LONG = {"resolution": None, "height": 16, "width": 32, "num_frames": 37, "num_steps": 2}
GIVEN = 33


def request(prompt="a red circle grows on a grey background", **options) -> Request:
    return Request(prompt, **(LONG | options))


def write_lossless(path, frames) -> str:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("rawvideo", rate=24)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "bgr24"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))
    return str(path)


@pytest.fixture(scope="module")
def pipeline():
    return Pipeline.load(dtype="fp32", progress=False)


@pytest.fixture(scope="module")
def extended(pipeline):
    return pipeline(request(extend=2))


def test_each_piece_is_what_v2v_head_draws_from_the_frames_before(pipeline, extended, tmp_path):
    assert extended.frames.shape == (37 + 2 * 4, 16, 32, 3)
    np.testing.assert_array_equal(extended.frames[:37], pipeline(request()).frames)
    for number, end in ((1, 37), (2, 41)):
        clip = write_lossless(tmp_path / f"{number}.avi", extended.frames[end - GIVEN : end])
        piece = pipeline(request(cond_type="v2v_head", refs=(clip,), seed=continuation_seed(0, number)))
        np.testing.assert_array_equal(extended.frames[end : end + 4], piece.frames[GIVEN:])
        other = pipeline(request(cond_type="v2v_head", refs=(clip,), seed=0))
        assert (extended.frames[end : end + 4] != other.frames[GIVEN:]).any(), "the seed matters"


def test_the_provenance_tells_the_whole(extended, tmp_path):
    told = extended.provenance
    assert (told.num_frames, told.seed, told.cond_type) == (45, 0, "t2v")
    assert (told.request["extend"], told.request["num_frames"]) == (2, 37)
    assert told.forward_passes == 2 * 2 + 2 * (2 * 3), "two branches for text, three with frames that are given"
    assert extended.save(tmp_path / "a")[0].is_file()


@pytest.mark.parametrize("cond_type", ["i2v_head", "v2v_head"])
def test_what_begins_with_a_reference_goes_on_too(pipeline, extended, tmp_path, cond_type):
    ref = tmp_path / "a.png"
    Image.fromarray(extended.frames[0]).save(ref)
    if cond_type == "v2v_head":
        ref = write_lossless(tmp_path / "a.avi", extended.frames[:GIVEN])
    options = {"cond_type": cond_type, "refs": (str(ref),)}
    longer, short = pipeline(request(extend=1, **options)), pipeline(request(**options))
    assert len(longer.frames) == 41
    np.testing.assert_array_equal(longer.frames[:37], short.frames)


def test_a_batch_is_extended_together(pipeline):
    first, second = pipeline.run([request(extend=1), request("a dog", seed=1, extend=1)])
    repeated, _ = pipeline.run([request(extend=1), request("a dog", seed=1, extend=1)])
    np.testing.assert_array_equal(first.frames, repeated.frames)
    assert len(first.frames) == len(second.frames) == 41
    assert (first.frames != second.frames).any()
