"""Tables from folders: where captions are looked for, what is left out, what is refused."""

import json
import logging

import pytest

from osjax.errors import OsjaxError
from osjax.training.prepare import prepare
from osjax.training.table import Clip, read_table
from tests.osjax.training.clip_files import write_ramp


@pytest.fixture
def folder(tmp_path):
    """a.mp4 of 9 frames, and deeper/b.MOV of 5."""
    folder = tmp_path / "clips"
    (folder / "deeper").mkdir(parents=True)
    write_ramp(folder / "a.mp4", 9, 32, 48, 24)
    write_ramp(folder / "deeper" / "b.mp4", 5, 48, 32, 30)
    (folder / "deeper" / "b.mp4").rename(folder / "deeper" / "b.MOV")
    return folder


def captions(table):
    return [(clip.text, clip.motion_score) for clip in read_table(table, progress=False)]


@pytest.mark.parametrize("name", ["data.csv", "data.parquet"])
def test_texts_beside_the_clips(folder, name):
    (folder / "a.txt").write_text('\ufeffA cat,\n"asleep"\n', encoding="utf-8")
    (folder / "deeper" / "b.json").write_text('{"text": "a dog", "motion_score": 4, "id": 7}')
    table = prepare(folder.parent / name, folder, progress=False)
    assert table == folder.parent / name
    assert read_table(table, progress=False) == [
        Clip(str(folder / "a.mp4"), 'A cat,\n"asleep"', 9, 32, 48, 24.0),
        Clip(str(folder / "deeper" / "b.MOV"), "a dog", 5, 48, 32, 30.0, 4.0),
    ]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("captions.csv", "text,motion_score,path\na cat,,a.mp4\na dog,2.5,deeper/b.MOV\n"),
        ("captions.json", '{"a.mp4": "a cat", "deeper/b.MOV": {"caption": "a dog", "motion_score": 2.5}}'),
    ],
)
def test_a_list_of_captions(folder, name, content):
    (folder / name).write_text(content)
    (folder / "a.txt").write_text("the list says it better")
    assert captions(prepare(folder / "data.csv", folder, progress=False)) == [("a cat", None), ("a dog", 2.5)]


def test_a_list_may_leave_some_to_the_texts_beside(folder):
    (folder / "captions.json").write_text('{"a.mp4": "a cat"}')
    (folder / "deeper" / "b.txt").write_text("a dog")
    assert captions(prepare(folder / "data.csv", folder, progress=False)) == [("a cat", None), ("a dog", None)]


def test_a_table_beside_its_clips_may_move_with_them(folder):
    (folder / "a.txt").write_text("a cat")
    prepare(folder.parent / "data.csv", folder, progress=False)
    moved = folder.parent.rename(folder.parent.with_name("moved"))
    (clip,) = read_table(moved / "data.csv", progress=False)
    assert clip.path == str(moved / "clips" / "a.mp4")


def test_a_table_elsewhere_holds_full_paths(folder, tmp_path_factory, monkeypatch):
    (folder / "a.txt").write_text("a cat")
    monkeypatch.chdir(folder.parent)
    table = prepare(tmp_path_factory.mktemp("elsewhere") / "new" / "data.csv", "clips", progress=False)
    assert str(folder / "a.mp4") in table.read_text()


def test_what_cannot_be_used_is_left_out_counted_and_named(folder, caplog):
    (folder / "captions.json").write_text('{"a.mp4": "a cat", "broken.mp4": "x", "lost.mp4": "y"}')
    (folder / "broken.mp4").write_bytes(b"no video" * 100)
    with caplog.at_level(logging.WARNING):
        table = prepare(folder / "data.csv", folder, progress=False)
    assert captions(table) == [("a cat", None)]
    assert [record.getMessage() for record in caplog.records] == [
        f"1 of 3 clips are left out, having no caption: {folder}/deeper/b.MOV",
        f"1 captions are of no clip in {folder}: {folder}/lost.mp4",
        f"{folder}/broken.mp4 is not a readable video: mend or remove it",
        "1 of 2 files are left out",
    ]


def test_a_bar_counts_the_clips(folder, capfd):
    (folder / "a.txt").write_text("a cat")
    prepare(folder / "data.csv", folder)
    assert "measure clips: 100%" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", json.dumps({"title": "a cat"}), r"caption of .*a.mp4: the text is missing"),
        ("a.json", json.dumps({"text": 3}), r"caption of .*a.mp4: the text is 3, of type int: give text"),
        ("a.json", json.dumps(["a", "b"]), r"caption of .*a.mp4: the text is \['a', 'b'\], of type list"),
        ("a.json", '{"text": "a', r"a.json is not JSON \(.*\): mend or remove it"),
        ("a.txt", " \n", r"caption of .*a.mp4: the text is missing"),
        ("a.txt", b"caf\xe9", r"cannot read .*a.txt as UTF-8 text"),
        ("captions.json", '["a"]', r"captions.json is a list: write an object of paths and captions"),
        ("captions.json", '{"a.mp4": {"text": "x", "motion_score": "high"}}', r"a.mp4: motion_score is 'high'"),
        ("captions.csv", "file,text\na.mp4,x\n", r"captions.csv has no column 'path'"),
        ("nothing.txt", "x", r"no clip in .* has a caption and can be read: write captions into NAME.txt"),
    ],
)
def test_captions_that_are_none(folder, name, content, message):
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(OsjaxError, match=message):
        prepare(folder / "data.csv", folder, progress=False)
    assert not (folder / "data.csv").exists()


def test_folders_without_clips(tmp_path):
    with pytest.raises(OsjaxError, match=r"no such folder: .*none: give the one that holds the clips"):
        prepare(tmp_path / "data.csv", tmp_path / "none", progress=False)
    with pytest.raises(OsjaxError, match=r"holds no clips: put \.avi, .* files there"):
        prepare(tmp_path / "data.csv", tmp_path, progress=False)
