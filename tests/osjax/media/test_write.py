"""Written videos and images: what is in them, that they repeat, and that they are whole or not there."""

import json
import os
import subprocess
import sys
from fractions import Fraction

import av
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from osjax.errors import OsjaxError
from osjax.media import MediaInfo, probe, to_uint8, write_mp4, write_png


def moving_squares(count: int, height: int = 64, width: int = 96) -> np.ndarray:
    frames = np.zeros((count, height, width, 3), np.uint8)
    frames[..., 0] = np.linspace(0, 255, width)
    frames[..., 1] = np.linspace(0, 255, height)[:, None]
    for number, frame in enumerate(frames):
        frame[8:40, 4 * number : 4 * number + 32] = [200, 30, 60]
    return frames


def decoded(path) -> np.ndarray:
    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def test_to_uint8_clamps_adds_a_half_and_truncates():
    levels = np.arange(256)
    exact = (levels / 127.5 - 1).astype(np.float32)
    np.testing.assert_array_equal(to_uint8(exact), levels)
    x = np.array([-7, -1, 0.4 / 127.5 - 1, 0.6 / 127.5 - 1, 0, 1, 7], np.float32)
    assert to_uint8(x).tolist() == [0, 0, 0, 1, 128, 255, 255]


@given(st.lists(st.floats(-2, 2, width=32), min_size=1))
def test_to_uint8_is_within_half_a_level(values):
    x = np.array(values, np.float32)
    back = to_uint8(x) / 127.5 - 1
    assert np.max(np.abs(back - np.clip(x, -1, 1))) <= 0.5 / 127.5 + 1e-6  # and the float32 rounding of the sum


def test_to_uint8_takes_jax_arrays_under_jit():
    x = jnp.linspace(-1.5, 1.5, 1001)
    frames = jax.jit(to_uint8)(x)
    assert frames.dtype == jnp.uint8
    np.testing.assert_allclose(frames.astype(int), to_uint8(np.asarray(x)).astype(int), atol=1)  # fused multiply-add
    assert to_uint8(x.astype(jnp.bfloat16)).dtype == jnp.uint8


def test_a_video_holds_the_frames_the_rate_and_the_comment(tmp_path):
    frames = moving_squares(9)
    comment = json.dumps({"prompt": 'rain, 雨 "é"\n; = \\ #'}, ensure_ascii=False) + "x" * 100_000
    write_mp4(tmp_path / "a.mp4", frames, 24, comment)
    assert probe(tmp_path / "a.mp4") == MediaInfo(frames=9, height=64, width=96, fps=24.0, comment=comment)
    back = decoded(tmp_path / "a.mp4")
    assert back.shape == frames.shape
    # crf 23 is visually close: the mean error is about one level, colours kept (swapped or unscaled ones are 30 off).
    assert np.abs(back.astype(int) - frames).mean() < 4
    assert np.abs(back[0, 20, 16].astype(int) - [200, 30, 60]).max() < 12


def test_the_stream_is_h264_yuv420p_with_its_colours_named(tmp_path):
    write_mp4(tmp_path / "a.mp4", moving_squares(3), 24)
    with av.open(str(tmp_path / "a.mp4")) as container:
        codec = container.streams.video[0].codec_context
        assert (codec.name, codec.pix_fmt) == ("h264", "yuv420p")
        assert (codec.colorspace, codec.color_range, codec.color_primaries, codec.color_trc) == (5, 1, 6, 6)  # BT.601
        times = [frame.time for frame in container.decode(video=0)]
    np.testing.assert_allclose(times, [0, 1 / 24, 2 / 24])
    assert b"crf=23" in (tmp_path / "a.mp4").read_bytes()  # the encoder's own note


def test_the_index_comes_first(tmp_path):
    """So that a browser starts before it has all."""
    write_mp4(tmp_path / "a.mp4", moving_squares(3), 24)
    data = (tmp_path / "a.mp4").read_bytes()
    assert data.index(b"moov") < data.index(b"mdat")


@pytest.mark.parametrize("fps", [1, 24, 23.976, 30000 / 1001, 60])
def test_frame_rates(tmp_path, fps):
    write_mp4(tmp_path / "a.mp4", moving_squares(3), fps)
    assert probe(tmp_path / "a.mp4").fps == pytest.approx(fps, rel=1e-6)
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert container.streams.video[0].average_rate == Fraction(fps).limit_denominator(1001)


def test_equal_frames_give_an_equal_file(tmp_path):
    """Whatever the memory held before: left to itself, the encoder's rate control is swayed by it."""
    chance = np.random.default_rng(0)
    noisy = moving_squares(12) + chance.integers(-9, 10, (12, 64, 96, 3))
    frames = noisy.clip(0, 255).astype(np.uint8)
    files = set()
    for _ in range(10):
        litter = [np.full(chance.integers(1, 60_000), chance.integers(256), np.uint8) for _ in range(60)]
        del litter[::2]
        write_mp4(tmp_path / "a.mp4", frames, 24, "same")
        files.add((tmp_path / "a.mp4").read_bytes())
    assert len(files) == 1


def test_frames_are_drawn_one_by_one_and_the_comment_last(tmp_path):
    seen = []

    def frames():
        for number, frame in enumerate(moving_squares(3)):
            seen.append(number)
            yield frame

    write_mp4(tmp_path / "a.mp4", frames(), 24, lambda: f"after {seen}")
    assert probe(tmp_path / "a.mp4").comment == "after [0, 1, 2]"


def test_an_error_among_the_frames_leaves_no_file(tmp_path):
    def frames():
        yield from moving_squares(2)
        raise RuntimeError("decoding failed")

    with pytest.raises(RuntimeError, match="decoding failed"):
        write_mp4(tmp_path / "a.mp4", frames(), 24)
    assert os.listdir(tmp_path) == []


def test_no_frames_and_odd_sizes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="at least one frame"):
        write_mp4(tmp_path / "a.mp4", [], 24)
    with pytest.raises(OsjaxError, match="a video of 33x32 cannot be stored as mp4: choose an even width and height"):
        write_mp4(tmp_path / "a.mp4", moving_squares(2, 32, 33), 24)
    assert os.listdir(tmp_path) == []


def test_a_png_holds_the_pixels_and_the_comment(tmp_path):
    (frame,) = moving_squares(1, 33, 47)
    write_png(tmp_path / "a.png", frame, "雨 " + "x" * 100_000)
    assert probe(tmp_path / "a.png") == MediaInfo(1, 33, 47, 0.0, "雨 " + "x" * 100_000)
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "a.png")), frame)


def test_files_without_a_comment_have_an_empty_one(tmp_path):
    write_mp4(tmp_path / "a.mp4", moving_squares(2), 24)
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    assert probe(tmp_path / "a.mp4").comment == probe(tmp_path / "a.png").comment == ""


def test_probe_refuses_other_files(tmp_path):
    with pytest.raises(OsjaxError, match="no such file"):
        probe(tmp_path / "none.mp4")
    for content in (b"", b"text", b"\x89PNG\r\n\x1a\nnot really"):
        (tmp_path / "a.mp4").write_bytes(content)
        with pytest.raises(OsjaxError, match=r"a.mp4 is neither a readable video nor a PNG"):
            probe(tmp_path / "a.mp4")


DISK_THAT_FILLS_UP = """
import os, resource, sys
import numpy as np
from osjax.errors import OsjaxError
from osjax.media import write_mp4, write_png

folder = sys.argv[1]
frames = np.random.default_rng(0).integers(0, 256, (4, 64, 96, 3), dtype=np.uint8)
writers = {"a.mp4": lambda path: write_mp4(path, frames, 24, "c"), "a.png": lambda path: write_png(path, frames[0])}
for name, write in writers.items():
    path = os.path.join(folder, name)
    write(path)
    whole = open(path, "rb").read()
    os.unlink(path)
    outcomes = set()
    for limit in sorted({0, 1, 20, 40, 100, *range(0, len(whole), len(whole) // 25), len(whole) - 1, len(whole)}):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            write(path)
        except OsjaxError as error:
            assert str(error).startswith(f"cannot write {path} (file too large): "), error
            assert os.listdir(folder) == [], (limit, os.listdir(folder))
            outcomes.add("refused")
        else:
            assert limit == len(whole), (limit, len(whole))
            assert open(path, "rb").read() == whole
            os.unlink(path)
            outcomes.add("written")
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    assert outcomes == {"refused", "written"}, outcomes
print("done")
"""


def test_a_disk_that_fills_up_at_any_byte_leaves_nothing(tmp_path):
    """The kernel refuses to let files grow past a limit, in a process of its own: the same path as a full disk."""
    script = [sys.executable, "-c", DISK_THAT_FILLS_UP, str(tmp_path)]
    done = subprocess.run(script, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, "done\n"), done.stderr
