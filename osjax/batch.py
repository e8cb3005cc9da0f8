"""Batches: a CSV of prompts in, rows, the names of their outputs and what is drawn together out."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import difflib
import logging
import os
import types
from collections.abc import Hashable, Iterator, Mapping, Sequence
from pathlib import Path

from osjax.errors import OsjaxError
from osjax.naming import output_stem

COLUMNS = ("text", "ref", "name")

_NONE: Mapping[str, str] = types.MappingProxyType({})
_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of a batch.

    index: its place in the file, from 0, blank lines not counted; options: those that it sets for itself, the words of
    its cells by key; where: the file and line, or '' if it stands in none.
    """

    index: int
    text: str
    refs: tuple[str, ...] = ()
    name: str | None = None
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    where: str = dataclasses.field(default="", compare=False)


@dataclasses.dataclass(frozen=True)
class Output:
    """One video to be made: its row, which sample of it (from 0), and the name of its files without their endings."""

    row: Row
    sample: int
    name: str


@contextlib.contextmanager
def located(where: str) -> Iterator[None]:
    """Says of an OsjaxError where the mistake stands: `FILE, line 3: what is wrong`; '' adds nothing."""
    try:
        yield
    except OsjaxError as error:
        if not where:
            raise
        raise OsjaxError(f"{where}: {error}") from error


def read_csv(
    path: str | os.PathLike[str], options: Mapping[str, str] = _NONE, refused: Mapping[str, str] = _NONE
) -> list[Row]:
    """Reads a UTF-8 CSV with a header: `text`, and if wanted `ref` (one path, or two with `;` between) and `name`.

    options: how a further column may be spelt, and the key that it stands for; an empty cell sets nothing. refused:
    columns that cannot be there, and why. Blank lines are skipped; other columns are ignored, with a warning. A
    relative reference is looked for in the working directory, then beside the CSV. Raises OsjaxError, naming the line,
    for whatever would surprise half-way through: no rows, no text, a line with too many fields, two equal names, a name
    that is no plain file name.
    """
    path = Path(path)
    rows = []
    names: dict[str, str] = {}
    for where, values in read_lines(path, COLUMNS, ("text",), options, refused):
        with located(where):
            row = _row(path.parent, len(rows), values, where)
            if row.name is not None and names.setdefault(row.name, where) != where:
                raise OsjaxError(f"the name {row.name!r} is taken by an earlier line: rename one")
        rows.append(row)
    if not rows:
        raise OsjaxError(f"{path} holds no prompts: add a line below the header")
    return rows


def read_lines(
    path: str | os.PathLike[str],
    columns: Sequence[str],
    required: Sequence[str],
    spellings: Mapping[str, str] = _NONE,
    refused: Mapping[str, str] = _NONE,
) -> Iterator[tuple[str, dict[str, str]]]:
    """The lines of a UTF-8 CSV with a header: where each stands (`FILE, line 3`), and its fields by column.

    A field of `columns` that the line or the header does not have is ''. spellings: how further columns may be spelt
    (dashes equal underscores), and the names that they then have. Blank lines are skipped; other columns are ignored,
    with a warning. refused: names that the header may not hold, and why. Raises OsjaxError for a file that cannot be
    read as one, a required column that is missing, one that is refused or stands there twice, a line with too many
    fields.
    """
    path = Path(path)
    every = dict.fromkeys((*columns, *spellings.values()), "")
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            lines = csv.reader(file, strict=True)
            filled = (fields for fields in lines if any(field.strip() for field in fields))
            header = _Header(columns, spellings, refused).read(path, next(filled, []), required)
            for fields in filled:
                where = f"{path}, line {lines.line_num}"
                if any(field.strip() for field in fields[len(header) :]):
                    count = f"{len(fields)} fields for {len(header)} columns"
                    raise OsjaxError(f"{where}: {count}: put quotes round a text that holds commas")
                values = dict(zip(header, fields, strict=False))  # a short line leaves the last columns empty
                yield where, every | {column: field for column, field in values.items() if column in every}
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
                with located(row.where):
                    raise OsjaxError(f"no such reference: {ref}: correct its path")
    return outputs


def group(keys: Sequence[Hashable], size: int) -> list[list[int]]:
    """Places 0, 1, … of the keys, in groups of up to `size` whose keys are equal, ordered by their first members.

    In a group places rise, and every group of a key but its last is full. Equal keys throughout: as they come.
    """
    groups: list[list[int]] = []
    unfilled: dict[Hashable, list[int]] = {}
    for place, key in enumerate(keys):
        if len(unfilled.get(key, ())) in (0, size):
            unfilled[key] = []
            groups.append(unfilled[key])
        unfilled[key].append(place)
    return groups


def split_refs(text: str) -> tuple[str, ...]:
    """Splits a `ref` field at `;`. Raises OsjaxError for more than two references."""
    refs = tuple(part.strip() for part in text.split(";") if part.strip())
    if len(refs) > 2:
        raise OsjaxError(f"{len(refs)} references in {text!r}: give one, or two with ; between them")
    return refs


@dataclasses.dataclass(frozen=True)
class _Header:
    """What the first line of a CSV may hold, as `read_lines` takes it."""

    columns: Sequence[str]
    spellings: Mapping[str, str]
    refused: Mapping[str, str]

    def read(self, path: Path, fields: Sequence[str], required: Sequence[str]) -> list[str]:
        """The columns by their names; an unknown one keeps its own."""
        written = [field.strip() for field in fields]
        header = [self.spellings.get(_underscored(name), name) for name in written]
        known = ", ".join(self.columns)
        for name in required:
            if name not in header:
                advice = f"name the columns in its first line, with commas, from {known}"
                raise OsjaxError(f"{path} has no column {name!r}: {advice}")
        for name in written:
            if _underscored(name) in self.refused:
                raise OsjaxError(f"{path}, line 1: column {name!r}: {self.refused[_underscored(name)]}")
        for name in (*self.columns, *dict.fromkeys(self.spellings.values())):
            if header.count(name) > 1:
                raise OsjaxError(f"{path} has several columns {name!r}: keep one")
        ours = {*self.columns, *self.spellings.values()}
        unknown = ", ".join(name + self._guess(name) for name in header if name and name not in ours)
        if unknown:
            more = ", options of a video" if self.spellings else ""
            _log.warning("%s: ignoring the columns %s (known: %s%s)", path, unknown, known, more)
        return header

    def _guess(self, name: str) -> str:
        known = (*self.columns, *self.spellings, *self.refused)
        nearest = difflib.get_close_matches(_underscored(name).lower(), known, n=1, cutoff=0.75)
        return f" (did you mean {nearest[0]}?)" if nearest else ""


def _underscored(name: str) -> str:
    return name.replace("-", "_")


def _row(folder: Path, index: int, values: Mapping[str, str], where: str) -> Row:
    text, ref, name = (values[column] for column in COLUMNS)
    if not text.strip():
        raise OsjaxError("the text is missing: describe the video")
    refs = tuple(resolve(part, folder) for part in split_refs(ref))
    name = output_stem(name.strip()) if name.strip() else None  # refuses what names no file
    options = {key: word.strip() for key, word in values.items() if key not in COLUMNS and word.strip()}
    return Row(index, text, refs, name, options, where)


def resolve(ref: str, folder: Path) -> str:
    """A path in a table that stands in `folder`: of the working directory, or if it is only there, beside the table."""
    beside = str(folder / ref)
    return beside if not os.path.exists(ref) and os.path.exists(beside) else ref
