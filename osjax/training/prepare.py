"""A table from a folder of clips: what they show is taken from texts beside them, the rest is measured.

The caption of `a.mp4` is looked for in the folder's `captions.csv` (columns path, text and if wanted motion_score) or,
without one, its `captions.json` ({path: caption}), then in `a.txt`, then in `a.json`. A caption in JSON is a text or
{"text": …, "motion_score": …}, where "caption" is taken for "text".
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from osjax.batch import read_lines
from osjax.errors import OsjaxError
from osjax.media import VIDEO_SUFFIXES
from osjax.training.table import REQUIRED, Entry, complete, listed, to_entry, write_table

Values = Mapping[str, Any]

_COLUMNS = (*REQUIRED, "motion_score")

_log = logging.getLogger(__name__)


def prepare(
    table: str | os.PathLike[str], folder: str | os.PathLike[str], *, workers: int = 8, progress: bool = True
) -> Path:
    """Writes the table (`.csv` or `.parquet`) of all captioned clips below a folder; returns its path.

    Paths are relative to the table if the folder is beside it, else absolute. Clips without a caption or that cannot be
    read are left out, counted and named. Raises OsjaxError if none is left, or captions are not what they should be.
    """
    table, folder = Path(table), Path(folder)
    if not folder.is_dir():
        raise OsjaxError(f"no such folder: {folder}: give the one that holds the clips")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in VIDEO_SUFFIXES)
    if not files:
        raise OsjaxError(f"{folder} holds no clips: put {', '.join(sorted(VIDEO_SUFFIXES))} files there")
    clips = complete(_captioned(folder, files), workers=workers, progress=progress)
    if not clips:
        raise OsjaxError(
            f"no clip in {folder} has a caption and can be read: write captions into NAME.txt, mend the files"
        )
    write_table(table, [dataclasses.replace(clip, path=_as_written(clip.path, table)) for clip in clips])
    return table


def _captioned(folder: Path, files: Sequence[Path]) -> list[Entry]:
    """The files that have a caption; the others are named in the log."""
    listed_captions = _listed_captions(folder)
    captions = {file: listed_captions.get(file) or _caption_beside(file) for file in files}
    bare = [str(file) for file, caption in captions.items() if caption is None]
    if bare:
        _log.warning("%d of %d clips are left out, having no caption: %s", len(bare), len(files), listed(bare))
    lost = [str(file) for file in listed_captions if file not in captions]
    if lost:
        _log.warning("%d captions are of no clip in %s: %s", len(lost), folder, listed(lost))
    return [_entry(file, caption) for file, caption in captions.items() if caption is not None]


def _listed_captions(folder: Path) -> dict[Path, Values]:
    """What the folder's own list says, by file."""
    as_csv, as_json = folder / "captions.csv", folder / "captions.json"
    if as_csv.exists():
        return {folder / values["path"].strip(): values for _, values in read_lines(as_csv, _COLUMNS, REQUIRED)}
    if as_json.exists():
        captions = _read_json(as_json)
        if not isinstance(captions, dict):
            kind = type(captions).__name__
            raise OsjaxError(f"{as_json} is a {kind}: write an object of paths and captions")
        return {folder / name: _values(caption) for name, caption in captions.items()}
    return {}


def _caption_beside(file: Path) -> Values | None:
    as_text, as_json = file.with_suffix(".txt"), file.with_suffix(".json")
    if as_text.exists():
        return {"text": _read(as_text)}
    if as_json.exists():
        return _values(_read_json(as_json))
    return None


def _values(caption: Any) -> Values:
    """A caption in JSON, as columns of the table."""
    if isinstance(caption, dict):
        return {"text": caption.get("text", caption.get("caption")), "motion_score": caption.get("motion_score")}
    return {"text": caption}


def _entry(file: Path, caption: Values) -> Entry:
    try:
        return to_entry(file.parent, {**caption, "path": str(file)})
    except OsjaxError as error:
        raise OsjaxError(f"caption of {file}: {error}") from error


def _read_json(path: Path) -> Any:
    try:
        return json.loads(_read(path))
    except json.JSONDecodeError as error:
        raise OsjaxError(f"{path} is not JSON ({error}): mend or remove it") from error


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise OsjaxError(f"cannot read {path} as UTF-8 text: mend or remove it") from error


def _as_written(path: str, table: Path) -> str:
    file, beside = Path(path).resolve(), table.parent.resolve()
    return file.relative_to(beside).as_posix() if file.is_relative_to(beside) else str(file)
