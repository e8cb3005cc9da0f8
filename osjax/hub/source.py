"""What a hub is to the downloader: a list of files with sizes and digests, and a way to bring one."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path, PurePosixPath
from typing import Protocol

from tqdm import tqdm

from osjax.errors import OsjaxError

_CHUNK = 1 << 20


@dataclasses.dataclass(frozen=True)
class RemoteFile:
    """A file of a repository: `size` in bytes, `digest` in hexadecimal.

    64 digits are the SHA-256 of the content, 40 its name in Git (how Hugging Face tells small files apart); None if the
    hub tells neither. Raises OsjaxError for a path that leads out of the folder it is to be put in.
    """

    repo: str
    revision: str
    path: str
    size: int
    digest: str | None

    def __post_init__(self) -> None:
        path = PurePosixPath(self.path)
        if path.is_absolute() or ".." in path.parts:
            raise OsjaxError(f"{self.repo} holds a file {self.path!r} that leads out of its folder: do not trust it")

    def is_whole(self, local: Path) -> bool:
        """Whether the file at `local` has this content; reads all of it. Raises OsjaxError."""
        try:
            if local.stat().st_size != self.size:
                return False
            return self.digest is None or self._digest_of(local) == self.digest
        except OSError as error:
            raise OsjaxError(f"cannot read {local} ({error.strerror}): check the disk and permissions") from error

    def _digest_of(self, local: Path) -> str:
        if len(self.digest) == 64:
            hasher = hashlib.sha256()
        else:  # as `git hash-object` does it
            hasher = hashlib.sha1(b"blob %d\0" % self.size, usedforsecurity=False)
        bar = progress_bar(f"check {local.name}", self.size, leave=False, delay=1)
        with local.open("rb") as file, bar:
            while chunk := file.read(_CHUNK):
                hasher.update(chunk)
                bar.update(len(chunk))
        return hasher.hexdigest()


class Source(Protocol):
    """A hub."""

    def files(self, repo: str, revision: str | None) -> list[RemoteFile]:
        """All files of a repository at a branch, tag or commit (None: its default branch). Raises OsjaxError."""
        ...

    def held(self, file: RemoteFile, folder: Path) -> int:
        """Bytes of `file` that an interrupted `fetch` left in `folder`."""
        ...

    def fetch(self, file: RemoteFile, folder: Path) -> None:
        """Brings `file` to its path in `folder`, whole or not at all, going on where it was interrupted.

        Shows its progress on stderr. Raises OsjaxError.
        """
        ...


def progress_bar(what: str, size: int, held: int = 0, **options: object) -> tqdm:
    """A bar on stderr that tells bytes, rate and time left, of `size` bytes of which `held` are there."""
    return tqdm(total=size, initial=held, unit="B", unit_scale=True, desc=what, **options)
