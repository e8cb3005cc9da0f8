"""Latents and text embeddings on disk, so that later epochs need neither decode nor encode.

An entry is a few named arrays in one safetensors file. It is found by what it was made from (the file's path, size and
time of change, and the cut; or the caption) in a folder for what it was made by, so that nothing stale is ever found:
change the file or the autoencoder, and the entry is made anew.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import safetensors.numpy

from osjax.errors import OsjaxError
from osjax.files import replacing
from osjax.training.clips import BrokenClip, Cut

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Entries:
    """What a cache holds for the rows of a batch. keys: under which each row is found, or is to be put.

    arrays: name → array of all rows stacked; None unless there is an entry for every row.
    """

    keys: tuple[str, ...]
    arrays: Mapping[str, np.ndarray] | None


class Cache:
    """Entries in `folder` made by one model. Processes may share a folder."""

    def __init__(self, folder: str | os.PathLike[str], made_by: str):
        """made_by: whatever tells models and their settings apart, such as the digest of the VAE's weights."""
        self._folder = Path(folder) / _digest(made_by)[:16]

    def get(self, key: str) -> dict[str, np.ndarray] | None:
        """The arrays of an entry, None if there is none. A damaged entry is none, and is logged."""
        path = self._path(key)
        if not path.is_file():
            return None
        try:
            return safetensors.numpy.load_file(path)
        except (OSError, safetensors.SafetensorError) as error:
            _log.warning("%s is damaged (%s): it is made anew", path, error)
            return None

    def look_up(self, keys: Sequence[str]) -> Entries:
        """The entries of a batch."""
        found = [self.get(key) for key in keys]
        whole = all(arrays is not None for arrays in found)
        arrays = {name: np.stack([each[name] for each in found]) for name in found[0]} if whole else None
        return Entries(tuple(keys), arrays)

    def put(self, key: str, arrays: Mapping[str, np.ndarray]) -> None:
        """Writes an entry, whole or not at all. Raises OsjaxError for what the disk refuses."""
        # The format takes the memory of an array as it lies, whatever its strides.
        content = safetensors.numpy.save({name: np.ascontiguousarray(array) for name, array in arrays.items()})
        try:
            with replacing(self._path(key)) as temporary:
                temporary.write_bytes(content)
        except OsjaxError as error:
            # Another process that writes the same entry takes the unfinished file for a leftover.
            if not isinstance(error.__cause__, FileNotFoundError):
                raise

    def _path(self, key: str) -> Path:
        return self._folder / key[:2] / f"{key}.safetensors"


def clip_key(path: str | os.PathLike[str], cut: Cut, height: int, width: int) -> str:
    """The key of what is made from a cut of a file at that size. Raises BrokenClip if the file is gone."""
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:  # ValueError for a name with a zero byte
        raise BrokenClip(path, "does not exist") from error
    content = (os.path.abspath(path), status.st_size, status.st_mtime_ns)
    return _digest(repr((content, cut, height, width)))


def text_key(caption: str) -> str:
    """The key of what is made from a caption."""
    return _digest(caption)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
