"""Tables of clips: what is read, what is measured, what is refused and with which row."""

import logging
import math
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from osjax.errors import OsjaxError
from osjax.training.table import Clip, read_table, write_table
from tests.osjax.training.clip_files import write_ramp

HEADER = "path,text,num_frames,height,width,fps,motion_score\n"

TEXTS = (
    st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1).map(str.strip).filter(len)
)
WHOLE = st.integers(1, 10**6)
ABOVE_0 = st.floats(0, exclude_min=True, allow_infinity=False)
CLIPS = st.builds(Clip, TEXTS, TEXTS, WHOLE, WHOLE, WHOLE, ABOVE_0, st.none() | ABOVE_0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clips")
    write_ramp(folder / "a.mp4", 9, 32, 48, 24)
    write_ramp(folder / "b.mp4", 5, 48, 32, 30)
    (folder / "broken.mp4").write_bytes(b"no video" * 100)
    return folder


def write(path, content):
    path.write_text(content, encoding="utf-8")
    return path


def write_parquet(path, columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    return path


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
@given(clips=st.lists(CLIPS, min_size=1, max_size=5))
@settings(deadline=None, max_examples=30)
def test_what_is_written_is_read_back(tmp_path_factory, suffix, clips):
    path = tmp_path_factory.getbasetemp() / f"round_trip{suffix}"
    write_table(path, clips)
    assert read_table(path, progress=False) == clips


@given(data=st.binary(max_size=200))
@settings(deadline=None, max_examples=50)
def test_any_bytes_are_clips_or_one_line(tmp_path_factory, data):
    for name, content in (("any.csv", HEADER.encode() + data), ("any.parquet", data)):
        path = tmp_path_factory.getbasetemp() / name
        path.write_bytes(content)
        try:
            clips = read_table(path, progress=False)
        except OsjaxError:
            continue
        assert clips
        assert all(clip.path and clip.text and clip.num_frames >= 1 and clip.fps > 0 for clip in clips)


def test_what_a_row_does_not_say_is_measured(folder, monkeypatch):
    monkeypatch.chdir(folder)
    expected = [Clip("a.mp4", "a cat", 9, 32, 48, 24.0), Clip("b.mp4", "a dog", 5, 48, 32, 30.0, 4.0)]
    table = write(folder / "t.csv", "path,text,motion_score\na.mp4,a cat,\nb.mp4,a dog,4\n")
    assert read_table(table, progress=False) == expected
    columns = {"text": ["a cat", "a dog"], "path": ["a.mp4", "b.mp4"], "motion_score": [None, 4]}
    assert read_table(write_parquet(folder / "t.parquet", columns), progress=False) == expected


def test_what_a_row_says_is_believed_and_the_rest_measured(folder):
    table = write(folder / "t.csv", f"{HEADER}{folder}/a.mp4,a cat,7,,,12.5,\nnone.mp4,a dog,1,2,3,4,5\n")
    assert read_table(table, progress=False) == [
        Clip(f"{folder}/a.mp4", "a cat", 7, 32, 48, 12.5),
        Clip("none.mp4", "a dog", 1, 2, 3, 4.0, 5.0),
    ]


def test_paths_are_looked_for_beside_the_table_too(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (clip,) = read_table(write(folder / "t.csv", "path,text\na.mp4,a cat\n"), progress=False)
    assert clip.path == str(folder / "a.mp4")


def test_numbers_as_pandas_writes_them(folder):
    """A column with a gap becomes one of floats there, and the gap a NaN."""
    columns = {"path": ["a", "b"], "text": ["a", "b"], "num_frames": [9.0, 5.0], "height": [32, 48]}
    columns |= {"width": [48, 32], "fps": ["24", "30"], "motion_score": [math.nan, 2.5]}
    expected = [Clip("a", "a", 9, 32, 48, 24.0), Clip("b", "b", 5, 48, 32, 30.0, 2.5)]
    assert read_table(write_parquet(folder / "t.parquet", columns), progress=False) == expected


def test_files_that_cannot_be_measured_are_left_out_counted_and_named(folder, caplog):
    table = write(folder / "t.csv", "path,text\nbroken.mp4,x\na.mp4,a cat\nnone.mp4,y\n")
    with caplog.at_level(logging.WARNING):
        (clip,) = read_table(table, progress=False)
    assert clip.text == "a cat"
    broken, missing, count = [record.getMessage() for record in caplog.records]
    assert broken == f"{folder}/broken.mp4 is not a readable video: mend or remove it"
    assert missing == "none.mp4 does not exist: mend or remove it"
    assert count == "2 of 3 files are left out"


def test_a_table_of_broken_files_only(folder):
    with pytest.raises(OsjaxError, match=r"none of the 2 files in .*t.csv can be read: check that its paths are right"):
        read_table(write(folder / "t.csv", "path,text\nbroken.mp4,x\nnone.mp4,y\n"), progress=False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", r"t.csv has no column 'path'"),
        ("path,caption\na,b\n", r"t.csv has no column 'text': name the columns .* from path, text, num_frames"),
        (HEADER, r"t.csv holds no clips: add a row, or make the table with osjax train --prepare"),
        (HEADER + "\n,,\n", r"t.csv holds no clips"),
        (HEADER + "a,\n", r"t.csv, line 2: the text is missing: fill it in"),
        (HEADER + "a,b\n,b\n", r"t.csv, line 3: the path is missing"),
        (HEADER + "a,b,many\n", r"t.csv, line 2: num_frames is 'many': give a number"),
        (HEADER + "a,b,0\n", r"t.csv, line 2: num_frames is 0: give a whole number of at least 1"),
        (HEADER + "a,b,1,2.5\n", r"t.csv, line 2: height is 2.5: give a whole number"),
        (HEADER + "a,b,1,2,inf\n", r"t.csv, line 2: width is inf: give a whole number"),
        (HEADER + "a,b,1,2,3,0\n", r"t.csv, line 2: fps is 0: give a number above 0"),
        (HEADER + "a,b,1,2,3,inf\n", r"t.csv, line 2: fps is inf"),
        (HEADER + "a,b,1,2,3,24,-1\n", r"t.csv, line 2: motion_score is -1"),
        (HEADER + "a,b,1,2,3,24,4,5\n", r"t.csv, line 2: 8 fields for 7 columns"),
    ],
)
def test_mistakes_are_told_with_their_line(tmp_path, content, message):
    with pytest.raises(OsjaxError, match=message):
        read_table(write(tmp_path / "t.csv", content), progress=False)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"path": ["a"]}, r"t.parquet has no column 'text': name its columns from path, text"),
        ({"path": ["a"], "text": [3]}, r"t.parquet, row 1: the text is 3, of type int: give text"),
        ({"path": ["a", "b"], "text": ["x", None]}, r"t.parquet, row 2: the text is missing"),
        ({"path": ["a"], "text": [["x", "y"]]}, r"the text is \['x', 'y'\], of type list"),
        ({"path": ["a"], "text": [b"x"]}, r"of type bytes"),
        ({"path": [1.5], "text": ["x"]}, r"the path is 1.5, of type float"),
        ({"path": ["a"], "text": ["x"], "fps": [["24"]]}, r"fps is \['24'\]: give a number"),
        ({"path": pyarrow.array([], pyarrow.string()), "text": pyarrow.array([], pyarrow.string())}, "holds no clips"),
    ],
)
def test_columns_of_the_wrong_type(tmp_path, columns, message):
    with pytest.raises(OsjaxError, match=message):
        read_table(write_parquet(tmp_path / "t.parquet", columns), progress=False)


def test_files_that_are_no_table(tmp_path):
    for name in ("none.csv", "none.parquet"):
        with pytest.raises(OsjaxError, match=f"cannot read .*{name}"):
            read_table(tmp_path / name, progress=False)
    with pytest.raises(OsjaxError, match=r"cannot read .*t.parquet as parquet"):
        read_table(write(tmp_path / "t.parquet", "path,text\n"), progress=False)


def test_parquet_without_pyarrow_says_what_to_install(tmp_path):
    """In a process where importing it fails, as where it is not installed; CSV needs it as little as importing does."""
    write(tmp_path / "t.csv", f"{HEADER}a,b,1,2,3,4,5\n")
    code = (
        "import sys; sys.modules['pyarrow'] = None\n"
        "from osjax.errors import OsjaxError\n"
        "from osjax.training.table import read_table\n"
        "print(len(read_table('t.csv')))\n"
        "try: read_table('t.parquet')\n"
        "except OsjaxError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == ["1", "t.parquet needs pyarrow: pip install osjax[train], or use a CSV"], (
        done.stderr
    )
