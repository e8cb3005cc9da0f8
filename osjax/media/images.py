"""Reference images: decoded, turned upright, resized to cover the video's size and cropped in its centre."""

from __future__ import annotations

import os
import struct
import warnings
import zlib

import numpy as np
from PIL import Image, ImageOps

from osjax.errors import OsjaxError

MAX_PIXELS = 100_000_000

# What Pillow's decoders raise on damaged files; UnidentifiedImageError is an OSError.
DECODING_ERRORS = (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error, zlib.error)


def read_image(path: str | os.PathLike[str], height: int, width: int) -> np.ndarray:
    """Reads an image file as float32 [1, height, width, 3] in [-1, 1].

    The file's EXIF orientation is followed, transparency is dropped. Raises OsjaxError if the file is missing, no
    image, damaged or of more than 100 megapixels (which is found out before decoding).
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit here is MAX_PIXELS
        try:
            with Image.open(path) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise _too_large(path)
                pixels = resize_to_cover(ImageOps.exif_transpose(image), height, width)
        except Image.DecompressionBombError as error:
            raise _too_large(path) from error
        except FileNotFoundError as error:
            raise OsjaxError(f"no such reference image: {path}: check the path") from error
        except DECODING_ERRORS as error:
            raise OsjaxError(f"{path} is not a readable image: give a PNG, JPEG or WebP file") from error
    return to_model(pixels[None])


def resize_to_cover(image: Image.Image, height: int, width: int) -> np.ndarray:
    """Resizes an image (bicubic) until it covers the size, crops the centre: uint8 [height, width, 3].

    The crop starts at half of what is too much, a half rounded to the even number, as the reference does it. Raises
    OsjaxError for an image so narrow that covering the size would need more than 100 megapixels.
    """
    covering_height, covering_width = cover(image.height, image.width, height, width)
    if covering_height * covering_width > MAX_PIXELS:
        raise OsjaxError(
            f"an image of {image.width}x{image.height} is too narrow for a video of {width}x{height}: "
            "crop it to about the video's proportions"
        )
    top, left = round((covering_height - height) / 2), round((covering_width - width) / 2)
    resized = _to_rgb(image).resize((covering_width, covering_height), Image.Resampling.BICUBIC)
    return np.asarray(resized)[top : top + height, left : left + width]


def cover(height: int, width: int, to_height: int, to_width: int) -> tuple[int, int]:
    """The (height, width) of a picture scaled, proportions kept, until it just covers (to_height, to_width).

    The order of the float operations is part of the result: it decides which way a half is rounded.
    """
    by_height, by_width = to_height / height, to_width / width
    if by_height > by_width:
        return to_height, round(width * by_height)
    return round(height * by_width), to_width


def to_model(pixels: np.ndarray) -> np.ndarray:
    """Pixels in [0, 255], of any shape, to float32 in [-1, 1]; arrays on a device stay there."""
    return (pixels.astype(np.float32) / 255 - 0.5) / 0.5


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):  # Pillow would clip 16-bit grey at 255 instead of scaling it
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return image.convert("RGB")


def _too_large(path: str | os.PathLike[str]) -> OsjaxError:
    return OsjaxError(f"{path} has more than {MAX_PIXELS // 1_000_000} megapixels: scale it down first")
