"""Reference images: sizes, orientation, colour modes, limits and damaged files."""

import io
import random
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from osjax.errors import OsjaxError
from osjax.media import read_image, resize_to_cover
from osjax.media.images import cover

ORIENTATION = 0x0112


def gradient(height: int, width: int) -> np.ndarray:
    rows, columns = np.mgrid[0:height, 0:width]
    return np.stack([rows * 255 // height, columns * 255 // width, (rows + columns) % 256], -1).astype(np.uint8)


def test_an_image_of_the_right_size_keeps_its_pixels(tmp_path):
    pixels = gradient(32, 48)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    x_thwc = read_image(tmp_path / "a.png", 32, 48)
    assert x_thwc.shape == (1, 32, 48, 3)
    assert x_thwc.dtype == np.float32
    np.testing.assert_allclose(x_thwc[0], pixels / 127.5 - 1, atol=1e-6)  # float32 rounding of values below 1


@given(st.integers(1, 300), st.integers(1, 300), st.integers(1, 64), st.integers(1, 64))
def test_the_size_is_covered_in_the_images_proportions(height, width, to_height, to_width):
    covering = cover(height, width, to_height, to_width)
    assert covering[0] >= to_height
    assert covering[1] >= to_width
    assert to_height == covering[0] or to_width == covering[1]
    # One side is exact, the other at most half a pixel off.
    scale = max(to_height / height, to_width / width)
    assert abs(covering[0] - height * scale) <= 0.5 + 1e-9
    assert abs(covering[1] - width * scale) <= 0.5 + 1e-9


@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 40), st.integers(1, 40))
@settings(max_examples=50, deadline=None)
def test_any_size_fits_any_size(height, width, to_height, to_width):
    pixels = resize_to_cover(Image.fromarray(gradient(height, width)), to_height, to_width)
    assert pixels.shape == (to_height, to_width, 3)
    assert pixels.dtype == np.uint8


def test_the_centre_is_kept(tmp_path):
    pixels = np.zeros((16, 48, 3), np.uint8)
    pixels[:, 16:32] = 255
    assert np.all(resize_to_cover(Image.fromarray(pixels), 16, 16) == 255)


def test_exif_orientation_is_followed(tmp_path):
    pixels = gradient(32, 32)
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # the first row is shown as the right-hand column
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    Image.fromarray(np.rot90(pixels, -1)).save(tmp_path / "upright.png")
    np.testing.assert_array_equal(
        read_image(tmp_path / "turned.png", 32, 32), read_image(tmp_path / "upright.png", 32, 32)
    )


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "I;16"])
def test_every_colour_mode_gives_three_channels(tmp_path, mode):
    grey = np.linspace(0, 255, 32 * 32).reshape(32, 32)
    if mode == "I;16":
        image = Image.fromarray((grey * 257).astype(np.uint16))
    else:
        image = Image.fromarray(grey.astype(np.uint8)).convert("RGB").convert(mode)
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    image.save(path)
    x_thwc = read_image(path, 32, 32)
    assert x_thwc.shape == (1, 32, 32, 3)
    assert x_thwc[0, :8].mean() < -0.5 < 0.5 < x_thwc[0, -8:].mean()  # dark above, light below in each mode


def huge_png(path, width: int, height: int) -> None:
    """A PNG of any size in a few bytes, whose pixels are missing: whoever decodes it finds it damaged."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)


@pytest.mark.parametrize("size", [(10_001, 10_000), (100_000, 100_000)])
def test_over_100_megapixels_is_refused_before_decoding(tmp_path, size):
    huge_png(tmp_path / "huge.png", *size)
    tracemalloc.start()
    with pytest.raises(OsjaxError, match=r"huge\.png has more than 100 megapixels: scale it down"):
        read_image(tmp_path / "huge.png", 16, 16)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10_000_000


@pytest.mark.filterwarnings("error")
def test_just_under_100_megapixels_gets_as_far_as_decoding(tmp_path):
    huge_png(tmp_path / "large.png", 10_000, 10_000)
    with pytest.raises(OsjaxError, match="not a readable image"):
        read_image(tmp_path / "large.png", 16, 16)


def test_20_megapixels_are_read(tmp_path):
    Image.new("RGB", (5000, 4000), (255, 0, 0)).save(tmp_path / "a.png", compress_level=1)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png", 16, 16)[0, 8, 8], [1, -1, -1])


def test_an_image_too_narrow_to_cover_is_refused(tmp_path):
    Image.new("RGB", (1, 5000)).save(tmp_path / "a.png")
    with pytest.raises(OsjaxError, match="1x5000 is too narrow for a video of 1024x576"):
        read_image(tmp_path / "a.png", 576, 1024)


def test_missing_and_unreadable_files(tmp_path):
    with pytest.raises(OsjaxError, match="no such reference image"):
        read_image(tmp_path / "none.png", 16, 16)
    with pytest.raises(OsjaxError, match="not a readable image"):
        read_image(tmp_path, 16, 16)
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(OsjaxError, match=r"text.png is not a readable image: give"):
        read_image(tmp_path / "text.png", 16, 16)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF", "BMP"])
@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's, about damaged tags
def test_damaged_files_are_read_or_refused_in_one_line(tmp_path, kind):
    chance = random.Random(0)
    buffer = io.BytesIO()
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    Image.fromarray(gradient(40, 56)).save(buffer, kind, exif=exif)
    refusals = []
    for _ in range(150):
        data = bytearray(buffer.getvalue())[: chance.randrange(1, 2 * len(buffer.getvalue()))]
        for _ in range(3):
            data[int(chance.random() ** 3 * len(data))] = chance.randrange(256)
        (tmp_path / "a").write_bytes(data)
        try:
            assert read_image(tmp_path / "a", 16, 24).shape == (1, 16, 24, 3)
        except OsjaxError as error:
            refusals.append(str(error))
    assert len(refusals) > 30
    assert not any("\n" in line for line in refusals)
