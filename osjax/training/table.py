"""The table of a data set: a CSV or parquet file with a row for each clip.

Columns: `path` and `text` (the caption), and where known `num_frames`, `height`, `width`, `fps` and `motion_score`.
What a row does not say, but for the motion score, is measured in the file; `osjax train --prepare` writes a table that
says it all, so that this is done once.
"""

from __future__ import annotations

import csv
import dataclasses
import logging
import math
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

from tqdm import tqdm

from osjax.batch import read_lines, resolve
from osjax.errors import OsjaxError
from osjax.files import replacing
from osjax.training.clips import BrokenClip, measure

REQUIRED = ("path", "text")
MEASURED = ("num_frames", "height", "width", "fps")
NUMBERS = (*MEASURED, "motion_score")
COLUMNS = (*REQUIRED, *NUMBERS)
_WHOLE = frozenset({"num_frames", "height", "width"})
_LISTED = 20

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Clip:
    """A captioned file. num_frames, height and width (pixels), fps: as stored, before it is cut to a bucket.

    motion_score: upstream's measure of how much moves, None where nobody has measured it.
    """

    path: str
    text: str
    num_frames: int
    height: int
    width: int
    fps: float
    motion_score: float | None = None


@dataclasses.dataclass(frozen=True)
class Entry:
    """A row of a table, or a file on its way into one. known: some of NUMBERS."""

    path: str
    text: str
    known: Mapping[str, float]


def read_table(path: str | os.PathLike[str], *, workers: int = 8, progress: bool = True) -> list[Clip]:
    """The clips of a table, in its order; files that have to be measured and cannot be are left out, with a warning.

    A relative path is looked for in the working directory, then beside the table. Raises OsjaxError, naming the row,
    for a path or caption that is missing or no text and for a number that is none; for an empty table; and if none of
    its files can be read.
    """
    path = Path(path)
    rows = _read_parquet(path) if path.suffix == ".parquet" else read_lines(path, COLUMNS, REQUIRED)
    entries = []
    for where, values in rows:
        try:
            entries.append(to_entry(path.parent, values))
        except OsjaxError as error:
            raise OsjaxError(f"{where}: {error}") from error
    if not entries:
        raise OsjaxError(f"{path} holds no clips: add a row, or make the table with osjax train --prepare")
    clips = complete(entries, workers=workers, progress=progress)
    if not clips:
        raise OsjaxError(f"none of the {len(entries)} files in {path} can be read: check that its paths are right")
    return clips


def to_entry(folder: Path, values: Mapping[str, Any]) -> Entry:
    """A row of a table in `folder`, by its columns. Raises OsjaxError for what is no path, caption or number."""
    path, text = (_words(name, values.get(name)) for name in REQUIRED)
    numbers = {name: _number(name, values.get(name)) for name in NUMBERS}
    return Entry(resolve(path, folder), text, {name: number for name, number in numbers.items() if number is not None})


def complete(entries: Sequence[Entry], *, workers: int = 8, progress: bool = True) -> list[Clip]:
    """Measures what entries do not say, `workers` files at a time; leaves out files that cannot be read, naming them.

    Entries that say everything are believed: their files are not opened.
    """
    silent = not progress or all(_is_known(entry) for entry in entries)
    bar = {"desc": "measure clips", "unit": "clip", "total": len(entries), "disable": silent}
    with ThreadPoolExecutor(workers) as pool:
        results = list(tqdm(pool.map(_complete, entries), **bar))
    clips = [result for result in results if isinstance(result, Clip)]
    for result in results:
        if isinstance(result, BrokenClip):
            _log.warning("%s", result)
    if len(clips) < len(entries):
        _log.warning("%d of %d files are left out", len(entries) - len(clips), len(entries))
    return clips


def write_table(path: str | os.PathLike[str], clips: Sequence[Clip]) -> None:
    """Writes a table that `read_table` reads, parquet if its name ends so, else CSV. Raises OsjaxError."""
    path = Path(path)
    rows = [dataclasses.asdict(clip) for clip in clips]
    if path.suffix == ".parquet":
        pyarrow = _pyarrow(path)
        with replacing(path) as temporary:
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), temporary)
        return
    with replacing(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)


def listed(names: Collection[str]) -> str:
    """Names for a line of the log, no more of them than a reader wants."""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(list(names)[:_LISTED]) + more


def _is_known(entry: Entry) -> bool:
    return entry.known.keys() >= set(MEASURED)


def _complete(entry: Entry) -> Clip | BrokenClip:
    measures: dict[str, float] = {}
    if not _is_known(entry):
        try:
            measures = dataclasses.asdict(measure(entry.path))
        except BrokenClip as error:
            return error
    return Clip(entry.path, entry.text, **{**measures, **entry.known})


def _read_parquet(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    pyarrow = _pyarrow(path)
    try:
        table = pyarrow.parquet.read_table(path)
    except (OSError, pyarrow.ArrowException) as error:
        raise OsjaxError(f"cannot read {path} as parquet: check the path, or write the file again") from error
    for name in REQUIRED:
        if name not in table.column_names:
            raise OsjaxError(f"{path} has no column {name!r}: name its columns from {', '.join(COLUMNS)}")
    rows = table.select([name for name in COLUMNS if name in table.column_names]).to_pylist()
    for number, values in enumerate(rows, start=1):
        yield f"{path}, row {number}", {name: values.get(name) for name in COLUMNS}


def _pyarrow(path: Path) -> ModuleType:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise OsjaxError(f"{path} needs pyarrow: pip install osjax[train], or use a CSV") from error
    return pyarrow


def _words(name: str, value: Any) -> str:
    if value is None or (isinstance(value, str) and not value.strip()):
        raise OsjaxError(f"the {name} is missing: fill it in, or take the row out")
    if not isinstance(value, str):
        raise OsjaxError(f"the {name} is {value!r}, of type {type(value).__name__}: give text")
    return value.strip()


def _number(name: str, value: Any) -> float | None:
    """A number, None for an empty cell. Raises OsjaxError for anything else."""
    if value is None or (isinstance(value, str) and not value.strip()):
        return None
    try:
        number = float(value)
    except (TypeError, ValueError):
        raise OsjaxError(f"{name} is {value!r}: give a number, or leave it empty") from None
    if math.isnan(number):  # what an empty cell becomes on its way through pandas
        return None
    if name in _WHOLE:
        if number < 1 or not number.is_integer():
            raise OsjaxError(f"{name} is {value}: give a whole number of at least 1, or leave it empty")
        return int(number)
    if not 0 <= number < math.inf or (name == "fps" and number == 0):
        raise OsjaxError(f"{name} is {value}: give a number above 0, or leave it empty")
    return number
