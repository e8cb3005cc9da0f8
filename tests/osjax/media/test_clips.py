"""Reference clips: which frames, which way up, what is refused."""

import struct
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from osjax.errors import OsjaxError
from osjax.media import read_clip, read_image, read_reference, resize_clip_to_cover, write_mp4

CODING_ERROR = (
    0.03  # of H.264 at crf 23 on flat frames, in the model's range; two levels of the frames below differ by 0.16
)


def grey_levels(count: int, height: int = 32, width: int = 48) -> np.ndarray:
    """Frame i is flat with level 40 + 10 i: its number can be told from its mean."""
    levels = (40 + 10 * np.arange(count)).astype(np.uint8)
    return np.broadcast_to(levels[:, None, None, None], (count, height, width, 3))


def numbers(x_thwc: np.ndarray) -> list[int]:
    """The frame numbers in a clip made from `grey_levels`."""
    return np.round(((x_thwc.mean((1, 2, 3)) + 1) * 127.5 - 40) / 10).astype(int).tolist()


@pytest.fixture
def clip(tmp_path) -> Path:
    write_mp4(tmp_path / "clip.mp4", grey_levels(13), 24)
    return tmp_path / "clip.mp4"


def test_the_first_or_the_last_frames_are_taken(clip):
    head = read_clip(clip, 5, 32, 48)
    assert head.shape == (5, 32, 48, 3)
    assert head.dtype == np.float32
    assert numbers(head) == [0, 1, 2, 3, 4]
    assert numbers(read_clip(clip, 5, 32, 48, from_end=True)) == [8, 9, 10, 11, 12]
    assert numbers(read_clip(clip, 13, 32, 48, from_end=True)) == list(range(13))
    np.testing.assert_allclose(head[2], 60 / 127.5 - 1, atol=CODING_ERROR)


def test_a_short_clip_says_how_many_frames_there_are(clip):
    for from_end in (False, True):
        with pytest.raises(OsjaxError, match=r"clip.mp4 has 13 frames and 33 are needed: give a longer video"):
            read_clip(clip, 33, 32, 48, from_end=from_end)


def test_frames_are_resized_to_cover_and_cropped(clip):
    assert read_clip(clip, 2, 16, 16).shape == (2, 16, 16, 3)
    assert read_clip(clip, 2, 64, 80).shape == (2, 64, 80, 3)


def test_the_crop_offset_is_floored():
    """4 columns to 1 leave 3 too many: one goes on the left."""
    frames = np.zeros((1, 1, 4, 3), np.uint8)
    frames[:, :, 1] = 255
    assert np.all(resize_clip_to_cover(frames, 1, 1) == 1)


def test_bilinear_without_antialias():
    """Halving takes the mean of the two pixels round each centre, and enlarging repeats the border."""
    row = np.array([0, 100, 50, 250], np.uint8)
    frames = np.broadcast_to(row[None, None, :, None], (1, 2, 4, 3))
    small = resize_clip_to_cover(frames, 1, 2)
    np.testing.assert_allclose((small[0, 0, :, 0] + 1) * 127.5, [50, 150], atol=1e-4)
    large = resize_clip_to_cover(frames, 4, 8)
    np.testing.assert_allclose((large[0, 0, :, 0] + 1) * 127.5, [0, 25, 75, 87.5, 62.5, 100, 200, 250], atol=1e-4)


def test_a_rotated_clip_is_turned_upright(tmp_path):
    """A phone's clip: the matrix in the track header turns the stored rows by a quarter, clockwise."""
    frames = np.zeros((3, 32, 32, 3), np.uint8)
    frames[:, :8] = 255  # light above as stored, so light on the right as shown
    write_mp4(tmp_path / "a.mp4", frames, 24)
    data = bytearray((tmp_path / "a.mp4").read_bytes())
    matrix = data.index(b"tkhd") + 44  # after the tag: version, times, track, duration, layer, volume
    assert struct.unpack_from(">i", data, matrix) == (1 << 16,)
    struct.pack_into(">9i", data, matrix, 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    (tmp_path / "a.mp4").write_bytes(data)
    x_thwc = read_clip(tmp_path / "a.mp4", 1, 32, 32)
    assert x_thwc[0, :, -6:].mean() > 0.9
    assert x_thwc[0, :, :20].mean() < -0.9


def test_one_frame_may_come_from_an_image_or_a_video(clip, tmp_path):
    Image.new("RGB", (48, 32), (90, 90, 90)).save(tmp_path / "a.PNG")
    np.testing.assert_array_equal(
        read_reference(tmp_path / "a.PNG", 1, 32, 48), read_image(tmp_path / "a.PNG", 32, 48), strict=True
    )
    assert numbers(read_reference(clip, 1, 32, 48)) == [0]
    assert numbers(read_reference(clip, 1, 32, 48, from_end=True)) == [12]
    assert numbers(read_reference(clip, 9, 32, 48, from_end=True)) == list(range(4, 13))


def test_several_frames_do_not_come_from_an_image(tmp_path):
    Image.new("RGB", (48, 32)).save(tmp_path / "a.png")
    with pytest.raises(OsjaxError, match=r"a.png is not a video and 33 frames are needed: give a .*\.mp4"):
        read_reference(tmp_path / "a.png", 33, 32, 48)


def test_missing_files_and_other_files(tmp_path):
    with pytest.raises(OsjaxError, match="no such reference video"):
        read_clip(tmp_path / "none.mp4", 1, 16, 16)
    with pytest.raises(OsjaxError, match="no such reference video"):
        read_clip("http:none.mp4", 1, 16, 16)
    (tmp_path / "text.mp4").write_text("no video" * 100)
    with pytest.raises(OsjaxError, match=r"text.mp4 is not a readable video"):
        read_clip(tmp_path / "text.mp4", 1, 16, 16)


def test_sound_alone_is_no_video(tmp_path):
    with av.open(str(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        sound.rate = 44100
        container.mux(stream.encode(sound) + stream.encode(None))
    with pytest.raises(OsjaxError, match="holds no video stream"):
        read_clip(tmp_path / "sound.mp4", 1, 16, 16)


def test_a_clip_cut_off_half_way_is_refused_or_short(clip):
    clip.write_bytes(clip.read_bytes()[: clip.stat().st_size // 2])
    with pytest.raises(OsjaxError, match=r"clip.mp4 (is not a readable video|has \d+ frames and 13 are needed)"):
        read_clip(clip, 13, 32, 48)


def test_tags_that_are_not_utf8_do_not_matter(tmp_path):
    write_mp4(tmp_path / "a.mp4", grey_levels(2), 24, comment="abcdefgh")
    data = (tmp_path / "a.mp4").read_bytes()
    assert b"abcdefgh" in data
    (tmp_path / "a.mp4").write_bytes(data.replace(b"abcdefgh", b"caf\xe9caf\xe9"))
    assert numbers(read_clip(tmp_path / "a.mp4", 2, 32, 48)) == [0, 1]
