"""Bytes from a connection that may break, into a file that goes on where it stopped.

The hubs' own clients are not asked to do this: huggingface_hub 2 removes what came of a file when it gives up, and
compares no digest.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import BinaryIO

from osjax import files
from osjax.errors import OsjaxError
from osjax.hub.source import RemoteFile, progress_bar

PAUSES = (1.0, 2.0, 4.0, 8.0)  # seconds before each new try; what comes in between makes them start anew

# Opens the remote file at a byte. Gives the byte it really starts at, which is 0 where a server cannot skip, and what
# follows. Raises BrokenConnectionError, inside the block too.
Opener = Callable[[int], AbstractContextManager[tuple[int, Iterator[bytes]]]]


class BrokenConnectionError(Exception):
    """The connection broke, or the hub asks for patience: the same request may succeed later."""


def part_of(file: RemoteFile, folder: Path) -> Path:
    """Where an unfinished `file` lies. The digest in the name keeps versions of it apart."""
    target = folder / file.path
    return target.with_name(f"{target.name}.{(file.digest or file.revision)[:12]}.part")


def held(file: RemoteFile, folder: Path) -> int:
    """Bytes that are there of an unfinished `file`."""
    part = part_of(file, folder)
    return os.path.getsize(part) if os.path.isfile(part) else 0


def receive(file: RemoteFile, folder: Path, opener: Opener, pauses: Sequence[float] = PAUSES) -> None:
    """Brings `file` to its path in `folder`: its part is completed, checked, and renamed.

    Raises OsjaxError for a connection that stays broken and a full disk (the part stays), and for wrong content (the
    part is removed).
    """
    part = part_of(file, folder)
    files.make_folder(part.parent)
    with _alone(part) as sink:
        with progress_bar(file.path, file.size, sink.tell()) as bar:
            _complete(sink, file, opener, pauses, bar.update)
        if not file.is_whole(part):
            part.unlink()
            raise OsjaxError(
                f"{file.path} did not come as {file.repo} lists it and was removed: run the same command again"
            )
        with _writing(part):
            files.settle(part, folder / file.path)


def _complete(
    sink: BinaryIO, file: RemoteFile, opener: Opener, pauses: Sequence[float], advance: Callable[[int], object]
) -> None:
    """Appends to `sink` until it is as long as `file`, or longer, which is found out later."""
    patience = list(pauses)
    while (start := sink.tell()) < file.size:
        reason = "the connection was closed"
        try:
            with opener(start) as (offset, chunks):
                if offset != start:
                    sink.seek(sink.truncate(offset))
                    advance(offset - start)
                for chunk in chunks:
                    _write(sink, chunk)
                    advance(len(chunk))
                    if sink.tell() > file.size:
                        return
        except BrokenConnectionError as error:
            reason = str(error)
        if sink.tell() == file.size:
            return
        if sink.tell() > start:
            patience = list(pauses)
        if not patience:
            raise OsjaxError(
                f"{file.path} stopped at {sink.tell():,} of {file.size:,} bytes ({reason}): "
                "the same command goes on from there"
            )
        time.sleep(patience.pop(0))


def _write(sink: BinaryIO, chunk: bytes) -> None:
    rest = memoryview(chunk)
    with _writing(Path(sink.name)):
        while rest:  # a disk that fills takes some of it first
            rest = rest[sink.write(rest) :]


@contextlib.contextmanager
def _alone(part: Path) -> Iterator[BinaryIO]:
    """`part`, opened to be appended to, by one process at a time."""
    with _writing(part):
        sink = part.open("ab", buffering=0)  # what came is there, also if the process is killed
    with sink:
        try:
            fcntl.flock(sink, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise OsjaxError(f"another process is downloading {part}: wait for it") from error
        except OSError:
            pass  # the file system has no locks, and goes without
        yield sink


@contextlib.contextmanager
def _writing(part: Path) -> Iterator[None]:
    """Turns what the disk refuses into an OsjaxError."""
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = "make room, and the same command goes on" if full else "choose another folder with --to"
        raise OsjaxError(f"cannot write {part} ({error.strerror.lower()}): {remedy}") from error
