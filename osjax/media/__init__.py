"""Media in and out: reference images and clips as arrays, frames as mp4 or PNG.

Arrays are `thwc`: T frames, H rows, W columns, C = 3 colours (RGB). The model's are float32 in [-1, 1], those
of files are uint8.
"""

from osjax.media.clips import VIDEO_SUFFIXES, read_clip, read_reference, resize_clip_to_cover
from osjax.media.images import read_image, resize_to_cover, to_model
from osjax.media.write import MediaInfo, probe, to_uint8, write_mp4, write_png

__all__ = [
    "VIDEO_SUFFIXES",
    "MediaInfo",
    "probe",
    "read_clip",
    "read_image",
    "read_reference",
    "resize_clip_to_cover",
    "resize_to_cover",
    "to_model",
    "to_uint8",
    "write_mp4",
    "write_png",
]
