"""Files on disk, whole or not at all.

A file is written under a temporary name in the folder of its final one, flushed to the disk and renamed. Whoever sees
the final name sees the whole file, also after a crash or a full disk.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from osjax.errors import OsjaxError

_SUFFIX = ".part"


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a temporary path to write to; it becomes `path` when the block ends well and vanishes when it does not.

    The folder is made if it is missing. Temporary files that a killed process left behind for the same `path` are
    removed. Raises OsjaxError for whatever the disk refuses, inside the block too.
    """
    path = Path(path)
    temporary = _temporary(path)
    make_folder(path.parent)
    try:
        _remove_leftovers(path)
        yield temporary
        settle(temporary, path)
    except OSError as error:
        raise OsjaxError(
            f"cannot write {path} ({_reason(error)}): choose a folder you may write to, on a disk with space left"
        ) from error
    finally:
        with contextlib.suppress(OSError):  # already renamed, or never made
            temporary.unlink()


def settle(temporary: Path, path: Path) -> None:
    """Gives a finished file of the same disk its name, once its content is on the disk. Raises OSError."""
    _flush(temporary)
    os.replace(temporary, path)
    _flush(path.parent)


@contextlib.contextmanager
def making_folder(path: str | os.PathLike[str], *, replace: bool = False) -> Iterator[Path]:
    """Gives a temporary folder to fill; it becomes `path` when the block ends well and vanishes when it does not.

    `path` must not exist, but for an empty folder; with `replace` it may, and stays until the new one is whole. What
    killed processes left behind for it is removed. Raises OsjaxError for a path that is taken, and for whatever the
    disk refuses, inside the block too.
    """
    path = Path(path)
    if not replace and path.exists() and not (path.is_dir() and not any(path.iterdir())):
        raise OsjaxError(f"{path} exists: remove it, or choose another place")
    temporary = _temporary(path)
    make_folder(path.parent)
    try:
        _remove_leftovers(path)
        temporary.mkdir()
        yield temporary
        for made in temporary.rglob("*"):
            _flush(made)
        if replace and path.exists():
            os.replace(path, _temporary(path))  # at once, which removing it is not
        os.replace(temporary, path)
        _flush(path.parent)
        if replace:
            _remove_leftovers(path)
    except OSError as error:
        raise OsjaxError(
            f"cannot write {path} ({_reason(error)}): choose a place you may write to, on a disk with space left"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)  # already renamed, or never made


def make_folder(path: str | os.PathLike[str]) -> Path:
    """Makes a folder and its parents if missing. Raises OsjaxError, also for one that may not be written to."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OsjaxError(f"cannot make the folder {path} ({_reason(error)}): choose another place") from error
    if not os.access(path, os.W_OK | os.X_OK):
        raise OsjaxError(f"cannot write to the folder {path}: choose one that you may write to")
    return path


def digest(path: str | os.PathLike[str]) -> str:
    """SHA-256 of a file's bytes, in hexadecimal. Raises OsjaxError."""
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise OsjaxError(f"cannot read {path} ({_reason(error)}): check the path and its permissions") from error


def _temporary(path: Path) -> Path:
    """A name beside `path` that nobody else uses."""
    return path.with_name(f"{_prefix(path)}.{secrets.token_hex(4)}{_SUFFIX}")


def _remove_leftovers(path: Path) -> None:
    """Removes what killed processes left under temporary names for the same `path`."""
    for leftover in path.parent.glob(f"{_prefix(path)}.*{_SUFFIX}"):
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink(missing_ok=True)


def _prefix(path: Path) -> str:
    return "." + hashlib.sha256(path.name.encode()).hexdigest()[:16]  # the longest names leave no room for more


def _flush(path: Path) -> None:
    """Waits until a file's content, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: OSError) -> str:
    return (error.strerror or str(error) or type(error).__name__).lower()
