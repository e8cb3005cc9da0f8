"""CSV batches: what is read, what is refused and with which line, and that names stay put."""

import csv
import logging

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from osjax.batch import Output, Row, group, plan_outputs, read_csv, resolve, select, split_refs
from osjax.errors import OsjaxError

# All that UTF-8 can hold. Python's csv cannot write NUL in every version.
CHARACTERS = st.characters(exclude_categories=["Cs"], exclude_characters="\0")
TEXTS = st.text(CHARACTERS, min_size=1).filter(str.strip)
NAMES = st.text(st.characters(categories=["L", "N"]), min_size=1, max_size=40)


def write(path, content: str | bytes):
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@given(rows=st.lists(st.tuples(TEXTS, NAMES), min_size=1, unique_by=lambda row: row[1]), bom=st.booleans())
@settings(deadline=None)
def test_whatever_csv_writes_is_read_back(tmp_path_factory, rows, bom):
    path = tmp_path_factory.getbasetemp() / "round_trip.csv"
    with path.open("w", encoding="utf-8-sig" if bom else "utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["name", "text"])
        writer.writerows((name, text) for text, name in rows)
    assert read_csv(path) == [Row(index, text, (), name) for index, (text, name) in enumerate(rows)]


@given(data=st.binary(max_size=200))
@settings(deadline=None)
def test_any_bytes_are_rows_or_one_line(tmp_path_factory, data):
    path = write(tmp_path_factory.getbasetemp() / "any.csv", b"text,name\n" + data)
    try:
        rows = read_csv(path)
    except OsjaxError:
        return
    assert rows
    assert all(row.text.strip() for row in rows)


def test_columns_in_any_order_with_quotes_newlines_and_blank_lines(tmp_path):
    content = (
        '\n name ,ref, text\r\n\r\none,,"A ""big"" cat,\nasleep"\r\n  \r\n,a.png; b.png,two\r\n,\t,three\r\n,,\r\n'
    )
    assert read_csv(write(tmp_path / "a.csv", content)) == [
        Row(0, 'A "big" cat,\nasleep', (), "one"),
        Row(1, "two", ("a.png", "b.png"), None),
        Row(2, "three", (), None),
    ]


def test_only_a_text_column_and_short_lines(tmp_path):
    assert read_csv(write(tmp_path / "a.csv", "text\na cat")) == [Row(0, "a cat")]
    assert read_csv(write(tmp_path / "a.csv", "text,ref,name\na cat\n")) == [Row(0, "a cat")]
    assert read_csv(write(tmp_path / "a.csv", "text\na cat,,\n")) == [Row(0, "a cat")]


def test_other_columns_are_ignored_with_one_warning(tmp_path, caplog):
    with caplog.at_level(logging.WARNING):
        rows = read_csv(write(tmp_path / "a.csv", "text,path,num_frames,\na,x,1,\nb,y,2,\n"))
    assert rows == [Row(0, "a"), Row(1, "b")]
    (record,) = caplog.records
    assert "ignoring the columns path, num_frames (known: text, ref, name)" in record.getMessage()


OPTIONS = {"num_steps": "a.num_steps", "a.num_steps": "a.num_steps", "seed": "seed"}
REFUSED = {"mesh": "say it once"}


def test_further_columns_in_every_spelling(tmp_path, caplog):
    content = "text, num-steps ,Seed,Num_step\na, 3 ,,\nb,,7,9\n"
    with caplog.at_level(logging.WARNING):
        rows = read_csv(write(tmp_path / "a.csv", content), OPTIONS, REFUSED)
    assert [dict(row.options) for row in rows] == [{"a.num_steps": "3"}, {}]
    assert [row.where for row in rows] == [f"{tmp_path}/a.csv, line {line}" for line in (2, 3)]
    (record,) = caplog.records
    told = "Seed (did you mean seed?), Num_step (did you mean num_steps?) (known: text, ref, name, options of a video)"
    assert record.getMessage().endswith(f"ignoring the columns {told}")
    (row,) = read_csv(write(tmp_path / "a.csv", "a.num-steps,text\n5,a\n"), OPTIONS)
    assert row.options == {"a.num_steps": "5"}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ("text,mesh", "line 1: column 'mesh': say it once"),
        ("text,num_steps,a.num-steps", "several columns 'a.num_steps'"),
    ],
)
def test_columns_that_cannot_be_there(tmp_path, header, message):
    with pytest.raises(OsjaxError, match=message):
        read_csv(write(tmp_path / "a.csv", f"{header}\na\n"), OPTIONS, REFUSED)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "has no column 'text'"),
        ("prompt\na cat\n", "has no column 'text'"),
        ("text;ref\na cat;\n", "has no column 'text': name the columns in its first line, with commas"),
        ("text,text\na,b\n", "several columns 'text'"),
        ("text,ref\n", "holds no prompts"),
        ("text,ref\n,\n\n", "holds no prompts"),
        ("text,name\na,x\n,y\n", "line 3: the text is missing"),
        ("name,text\nx\n", "line 2: the text is missing"),
        ("text\na cat, asleep\n", "line 2: 2 fields for 1 columns: put quotes"),
        ("text,ref\na,1;2;3\n", "line 2: 3 references"),
        ('text,name\n"a\nb",x\nc,x\n', "line 4: the name 'x' is taken by an earlier line"),
        ("text,name\na,../x\n", "line 2: .*cannot name a file"),
        ("text,name\na,..\n", "line 2: .*cannot name a file"),
        ("text,name\na,/etc/x\n", "line 2: .*cannot name a file"),
        ("text,name\na," + "x" * 300, "line 2: the file name .* bytes long"),
        ('text\n"a cat\n', "is not a well-formed CSV .*: check its quotes"),
        ('text\n"a" cat\n', "is not a well-formed CSV"),
        ("text\n" + "x" * 200_000, "is not a well-formed CSV"),
        (b"text\ncaf\xe9\n", "is not UTF-8 text: save it as"),
        ("text\na\n".encode("utf-16"), "is not UTF-8 text"),
    ],
)
def test_mistakes_are_told_with_their_line(tmp_path, content, message):
    with pytest.raises(OsjaxError, match=message) as caught:
        read_csv(write(tmp_path / "a.csv", content))
    assert str(caught.value).startswith(str(tmp_path / "a.csv"))


def test_a_missing_file(tmp_path):
    with pytest.raises(OsjaxError, match="cannot read"):
        read_csv(tmp_path / "none.csv")
    with pytest.raises(OsjaxError, match="cannot read"):
        read_csv(tmp_path)


def test_references_are_found_in_the_working_directory_then_beside_the_csv(tmp_path, monkeypatch):
    (tmp_path / "csv").mkdir()
    (tmp_path / "here").mkdir()
    for path in ("csv/both.png", "csv/beside.png", "here/both.png"):
        (tmp_path / path).touch()
    monkeypatch.chdir(tmp_path / "here")
    content = f"text,ref\na,both.png;beside.png\nb,none.png\nc,{tmp_path}/csv/both.png\n"
    beside, missing, absolute = read_csv(write(tmp_path / "csv" / "a.csv", content))
    assert beside.refs == ("both.png", str(tmp_path / "csv" / "beside.png"))
    assert missing.refs == ("none.png",)
    assert absolute.refs == (str(tmp_path / "csv" / "both.png"),)


def test_a_reference_that_no_file_can_be_named(tmp_path):
    """What the file system would refuse as a name is a missing reference like any other."""
    for name in ("x" * 5000, "nul\0"):
        assert resolve(name, tmp_path) == name
        with pytest.raises(OsjaxError, match="no such reference"):
            plan_outputs([Row(0, "a", (name,))], fallback="p")


def test_split_refs():
    assert split_refs("") == split_refs(" ; ") == ()
    assert split_refs("a b.png") == ("a b.png",)
    assert split_refs(" a.png ;b.png; ") == ("a.png", "b.png")
    with pytest.raises(OsjaxError, match="3 references in 'a;b;c': give one, or two"):
        split_refs("a;b;c")


ROWS = [Row(index, f"text {index}") for index in range(5)]


def test_select_keeps_the_index():
    assert select(ROWS) == ROWS
    assert [row.index for row in select(ROWS, 2)] == [2, 3, 4]
    assert [row.index for row in select(ROWS, 1, 3)] == [1, 2]
    assert [row.index for row in select(ROWS, 3, 99)] == [3, 4]
    assert select(select(ROWS, 2), 3, 4) == [ROWS[3]]


@pytest.mark.parametrize("limits", [(5, None), (3, 3), (4, 2), (0, 0)])
def test_select_refuses_an_empty_range(limits):
    with pytest.raises(OsjaxError, match=r"no row from \d up to \d among 5: change start_index or end_index"):
        select(ROWS, *limits)


@pytest.mark.parametrize("limits", [(-1, None), (0, -1)])
def test_select_refuses_negative_indices(limits):
    with pytest.raises(OsjaxError, match="count from 0"):
        select(ROWS, *limits)


def test_outputs_are_named_by_the_place_in_the_file():
    rows = [Row(3, "a"), Row(4, "b", name="cat")]
    assert plan_outputs(rows, fallback="prompts", samples=2) == [
        Output(rows[0], 0, "prompts_0003"),
        Output(rows[0], 1, "prompts_0003_1"),
        Output(rows[1], 0, "cat"),
        Output(rows[1], 1, "cat_1"),
    ]


@given(st.integers(0, 4), st.integers(1, 5), st.integers(1, 3))
def test_a_range_gives_the_names_it_has_in_the_whole(start, length, samples):
    whole = plan_outputs(ROWS, fallback="p", samples=samples)
    part = plan_outputs(select(ROWS, start, start + length), fallback="p", samples=samples)
    assert part == [output for output in whole if start <= output.row.index < start + length]


def test_outputs_that_would_overwrite_each_other_are_refused():
    plan_outputs([Row(0, "a", name="x"), Row(1, "b", name="x_1")], fallback="p")
    with pytest.raises(OsjaxError, match="rows 0 and 1 would both be written to 'x_1'"):
        plan_outputs([Row(0, "a", name="x"), Row(1, "b", name="x_1")], fallback="p", samples=2)
    with pytest.raises(OsjaxError, match="rows 0 and 1 would both be written to 'p_0001'"):
        plan_outputs([Row(0, "a", name="p_0001"), Row(1, "b")], fallback="p")


def test_a_missing_reference_is_told_before_anything_is_made(tmp_path):
    (tmp_path / "a.png").touch()
    plan_outputs([Row(0, "a", (str(tmp_path / "a.png"),))], fallback="p")
    with pytest.raises(OsjaxError, match=r"rows, line 3: no such reference: .*b\.png"):
        plan_outputs([Row(0, "a"), Row(1, "b", (str(tmp_path / "b.png"),), where="rows, line 3")], fallback="p")


@given(keys=st.lists(st.sampled_from("abc"), max_size=20), size=st.integers(1, 4))
def test_groups_hold_every_place_once_and_in_order(keys, size):
    groups = group(keys, size)
    assert sorted(place for places in groups for place in places) == list(range(len(keys)))
    assert [places[0] for places in groups] == sorted(places[0] for places in groups)
    assert all(places == sorted(places) and len({keys[place] for place in places}) == 1 for places in groups)
    for key in set(keys):
        lengths = [len(places) for places in groups if keys[places[0]] == key]
        assert all(length == size for length in lengths[:-1])
        assert 1 <= lengths[-1] <= size


def test_equal_keys_are_grouped_as_they_come():
    assert group("aaaaa", 2) == [[0, 1], [2, 3], [4]]
    assert group("abab", 2) == [[0, 2], [1, 3]]
    assert group("", 2) == []
