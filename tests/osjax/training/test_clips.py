"""Single clips: what is measured, which frames are read, and that whatever is wrong with a file is a BrokenClip."""

import contextlib

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from osjax.media import read_clip, to_uint8
from osjax.training.clips import BrokenClip, Cut, Measures, measure, read_cut
from tests.osjax.training.clip_files import frame_numbers, write_ramp


@pytest.fixture(scope="module")
def ramp(tmp_path_factory):
    return write_ramp(tmp_path_factory.mktemp("clips") / "ramp.mp4", 30, 32, 48, 24)


def test_a_clip_is_measured(ramp, tmp_path):
    assert measure(ramp) == Measures(30, 32, 48, 24.0)
    film = write_ramp(tmp_path / "film.mp4", 5, 16, 16, 24000 / 1001)
    assert measure(film).fps == pytest.approx(24000 / 1001, abs=1e-9)


def test_containers_that_do_not_count_their_frames_are_counted(ramp, tmp_path):
    copy = tmp_path / "copy.mkv"
    with av.open(str(ramp)) as source, av.open(str(copy), "w") as target:
        stream = target.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(source.streams.video[0]):
            if packet.size:
                packet.stream = stream
                target.mux(packet)
    with av.open(str(copy)) as container:
        assert container.streams.video[0].frames == 0
    assert measure(copy) == Measures(30, 32, 48, 24.0)


def test_a_still_is_a_clip_of_one_frame(tmp_path):
    Image.new("RGB", (48, 32), (90, 90, 90)).save(tmp_path / "a.png")
    found = measure(tmp_path / "a.png")
    assert (found.num_frames, found.height, found.width) == (1, 32, 48)
    assert np.all(read_cut(tmp_path / "a.png", Cut(0, 1, 1), 16, 16) == 90)


@given(start=st.integers(0, 29), interval=st.integers(1, 5), num_frames=st.integers(1, 10))
@settings(deadline=None, max_examples=30)
def test_the_frames_of_a_cut(ramp, start, interval, num_frames):
    cut = Cut(start, interval, num_frames)
    wanted = list(range(30))[start : start + cut.span : interval]
    if len(wanted) == num_frames:
        assert frame_numbers(read_cut(ramp, cut, 16, 16)) == wanted
    else:
        with pytest.raises(BrokenClip, match=rf"ends before frame {start + cut.span}"):
            read_cut(ramp, cut, 16, 16)


@pytest.mark.parametrize("size", [(32, 48), (16, 16), (24, 64)])
def test_frames_are_sized_as_reference_clips_are(ramp, size):
    frames = read_cut(ramp, Cut(0, 1, 3), *size)
    assert frames.dtype == np.uint8
    np.testing.assert_array_equal(frames, to_uint8(read_clip(ramp, 3, *size)), strict=True)


def test_missing_empty_and_foreign_files(tmp_path):
    (tmp_path / "text.mp4").write_text("no video" * 100)
    (tmp_path / "empty.mp4").touch()
    for name, reason in (
        ("none.mp4", "does not exist"),
        ("text.mp4", "is not a readable video"),
        ("empty.mp4", "is not a readable video"),
        (".", "is not a readable video"),
        ("nul\0.mp4", "does not exist"),
    ):
        for read in (measure, lambda path: read_cut(path, Cut(0, 1, 1), 16, 16)):
            with pytest.raises(BrokenClip) as caught:
                read(tmp_path / name)
            assert caught.value.reason == reason
            assert str(caught.value) == f"{tmp_path / name} {reason}: mend or remove it"


def test_sound_alone_is_no_clip(tmp_path):
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.rate = 44100
        container.mux(stream.encode(sound) + stream.encode(None))
    with pytest.raises(BrokenClip, match="is not a readable video"):
        measure(tmp_path / "sound.mp4")


@given(data=st.data())
@settings(deadline=None, max_examples=40)
def test_damaged_files_are_read_or_broken(ramp, tmp_path_factory, data):
    """Cut off, or with some bytes changed: frames of the right shape come, or BrokenClip; nothing else."""
    content = bytearray(ramp.read_bytes())
    for place in data.draw(st.lists(st.integers(0, len(content) - 1), max_size=30)):
        content[place] ^= 0xFF
    path = tmp_path_factory.getbasetemp() / "damaged.mp4"
    path.write_bytes(content[: data.draw(st.integers(1, len(content)))])
    for read in (lambda: measure(path).num_frames, lambda: len(read_cut(path, Cut(2, 3, 4), 16, 16))):
        with contextlib.suppress(BrokenClip):
            assert read() >= 1
