"""From names to files in a folder: what is needed, what is there, whether it fits, and then file by file."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from osjax.errors import OsjaxError
from osjax.hub.sets import Part
from osjax.hub.source import RemoteFile, Source


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a download takes: all `files` that are needed in `folder`, those `missing` there, and `room` for them.

    `room` is in bytes, less what interrupted downloads left.
    """

    folder: Path
    files: tuple[RemoteFile, ...]
    missing: tuple[RemoteFile, ...]
    room: int

    def describe(self) -> str:
        """One line: needed, free, where."""
        free = _free(self.folder)
        return f"{tqdm.format_sizeof(self.room, 'B')} needed, {tqdm.format_sizeof(free, 'B')} free in {self.folder}"

    def table(self) -> str:
        """A line for each file: its size, its path, and whether it is there."""
        marks = ["" if file in self.missing else "  (there)" for file in self.files]
        pairs = zip(self.files, marks, strict=True)
        return "\n".join(f"{tqdm.format_sizeof(file.size, 'B'):>8}  {file.path}{mark}" for file, mark in pairs)


def plan(source: Source, parts: Sequence[Part], folder: Path, revision: str | None = None) -> Plan:
    """Asks the hub for the files of `parts` and compares them with what is in `folder`; writes nothing.

    `revision` is a branch, tag or commit of the first part's repository. Raises OsjaxError, also for a file of the
    same name that is another one, which a download would replace.
    """
    needed: list[RemoteFile] = []
    for part in parts:
        listed = source.files(part.repo, revision if part.repo == parts[0].repo else None)
        chosen = part.choose([file.path for file in listed])
        needed += [file for file in listed if file.path in chosen]
    missing = [file for file in needed if not _is_there(file, folder)]
    room = sum(file.size - source.held(file, folder) for file in missing)
    return Plan(folder, tuple(needed), tuple(missing), room)


def fetch(source: Source, plan: Plan) -> None:
    """Brings what is missing. Raises OsjaxError, before anything is written if the disk has not enough room."""
    if plan.room > _free(plan.folder):
        raise OsjaxError(f"not enough room, {plan.describe()}: make room, or choose another folder with --to")
    for file in plan.missing:
        source.fetch(file, plan.folder)


def _is_there(file: RemoteFile, folder: Path) -> bool:
    local = folder / file.path
    if not os.path.exists(local):
        return False
    if not file.is_whole(local):
        raise OsjaxError(f"{local} is not the file of {file.repo}: move it away, or choose another folder with --to")
    return True


def _free(folder: Path) -> int:
    """Bytes that may be written to the disk of `folder`, which need not exist yet."""
    existing = next(path for path in (folder, *folder.absolute().parents) if os.path.exists(path))
    return shutil.disk_usage(existing).free
