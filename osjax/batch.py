"""Batches: a CSV of prompts in, rows and the names of their outputs out."""

from __future__ import annotations

import csv
import dataclasses
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from osjax.errors import OsjaxError
from osjax.naming import output_stem

COLUMNS = ("text", "ref", "name")

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a batch. index: its place in the file, from 0, blank lines not counted."""

    index: int
    text: str
    refs: tuple[str, ...] = ()
    name: str | None = None


@dataclasses.dataclass(frozen=True)
class Output:
    """One video to be made: its row, which sample of it (from 0), and the name of its files without their endings."""

    row: Row
    sample: int
    name: str


def read_csv(path: str | os.PathLike[str]) -> list[Row]:
    """Reads a UTF-8 CSV with a header: `text`, and if wanted `ref` (one path, or two with `;` between) and `name`.

    Blank lines are skipped; other columns are ignored, with a warning. A relative reference is looked for in the
    working directory, then beside the CSV. Raises OsjaxError, naming the line, for whatever would surprise half-way
    through: no rows, no text, a line with too many fields, two equal names, a name that is no plain file name.
    """
    path = Path(path)
    rows = []
    names: dict[str, str] = {}
    for where, values in read_lines(path, COLUMNS, required=("text",)):
        try:
            row = _row(path.parent, len(rows), values)
            if row.name is not None and names.setdefault(row.name, where) != where:
                raise OsjaxError(f"the name {row.name!r} is taken by an earlier line: rename one")
        except OsjaxError as error:
            raise OsjaxError(f"{where}: {error}") from error
        rows.append(row)
    if not rows:
        raise OsjaxError(f"{path} holds no prompts: add a line below the header")
    return rows


def read_lines(
    path: str | os.PathLike[str], columns: Sequence[str], required: Sequence[str]
) -> Iterator[tuple[str, dict[str, str]]]:
    """The lines of a UTF-8 CSV with a header: where each stands (`FILE, line 3`), and its fields by column.

    A field of `columns` that the line or the header does not have is ''. Blank lines are skipped; other columns are
    ignored, with a warning. Raises OsjaxError for a file that cannot be read as one, a required column that is missing,
    a column that stands there twice, a line with too many fields.
    """
    path = Path(path)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = csv.reader(file, strict=True)
            filled = (fields for fields in lines if any(field.strip() for field in fields))
            header = _check_header(path, next(filled, []), columns, required)
            for fields in filled:
                where = f"{path}, line {lines.line_num}"
                if any(field.strip() for field in fields[len(header) :]):
                    count = f"{len(fields)} fields for {len(header)} columns"
                    raise OsjaxError(f"{where}: {count}: put quotes round a text that holds commas")
                values = dict(zip(header, fields, strict=False))  # a short line leaves the last columns empty
                yield where, {column: values.get(column, "") for column in columns}
    except OSError as error:
        raise OsjaxError(f"cannot read {path} ({error.strerror}): check the path and its permissions") from error
    except UnicodeDecodeError as error:
        raise OsjaxError(f"{path} is not UTF-8 text: save it as a UTF-8 CSV") from error
    except csv.Error as error:
        raise OsjaxError(f"{path} is not a well-formed CSV ({error}): check its quotes") from error


def select(rows: Sequence[Row], start: int = 0, end: int | None = None) -> list[Row]:
    """The rows from index `start` up to `end`, itself not included; None is the last. They keep their index.

    Raises OsjaxError where that leaves no row, or for a negative index.
    """
    if start < 0 or (end is not None and end < 0):
        raise OsjaxError("start_index and end_index count from 0: give numbers of 0 and more")
    selected = [row for row in rows if start <= row.index and (end is None or row.index < end)]
    if not selected:
        limit = len(rows) if end is None else end
        raise OsjaxError(f"no row from {start} up to {limit} among {len(rows)}: change start_index or end_index")
    return selected


def plan_outputs(rows: Sequence[Row], *, fallback: str, samples: int = 1) -> list[Output]:
    """All videos of the rows, sample after sample of each row, named by `output_stem`.

    A row keeps its place in the file as its index, so other ranges and interrupted runs give the same names.

    Raises OsjaxError if two would share a name (row `a` sampled twice beside a row `a_1`), or a reference is missing:
    what can be known to fail fails before the first video.
    """
    outputs = [
        Output(row, sample, output_stem(row.name, fallback=fallback, index=row.index, sample=sample))
        for row in rows
        for sample in range(samples)
    ]
    seen: dict[str, Output] = {}
    for output in outputs:
        other = seen.setdefault(output.name, output)
        if other is not output:
            rows_named = f"rows {other.row.index} and {output.row.index}"
            raise OsjaxError(f"{rows_named} would both be written to {output.name!r}: rename one in the name column")
    for row in rows:
        for ref in row.refs:
            if not os.path.isfile(ref):  # which, unlike Path's, is False for names that no file can have
                raise OsjaxError(f"row {row.index}: no such reference: {ref}: correct its path")
    return outputs


def split_refs(text: str) -> tuple[str, ...]:
    """Splits a `ref` field at `;`. Raises OsjaxError for more than two references."""
    refs = tuple(part.strip() for part in text.split(";") if part.strip())
    if len(refs) > 2:
        raise OsjaxError(f"{len(refs)} references in {text!r}: give one, or two with ; between them")
    return refs


def _check_header(path: Path, fields: Sequence[str], columns: Sequence[str], required: Sequence[str]) -> list[str]:
    header = [field.strip() for field in fields]
    known = ", ".join(columns)
    for name in required:
        if name not in header:
            advice = f"name the columns in its first line, with commas, from {known}"
            raise OsjaxError(f"{path} has no column {name!r}: {advice}")
    for name in columns:
        if header.count(name) > 1:
            raise OsjaxError(f"{path} has several columns {name!r}: keep one")
    unknown = [name for name in header if name and name not in columns]
    if unknown:
        _log.warning("%s: ignoring the columns %s (known: %s)", path, ", ".join(unknown), known)
    return header


def _row(folder: Path, index: int, values: Mapping[str, str]) -> Row:
    text, ref, name = (values[column] for column in COLUMNS)
    if not text.strip():
        raise OsjaxError("the text is missing: describe the video")
    refs = tuple(resolve(part, folder) for part in split_refs(ref))
    return Row(index, text, refs, output_stem(name.strip()) if name.strip() else None)  # refuses what names no file


def resolve(ref: str, folder: Path) -> str:
    """A path in a table that stands in `folder`: of the working directory, or if it is only there, beside the table."""
    beside = str(folder / ref)
    return beside if not os.path.exists(ref) and os.path.exists(beside) else ref
