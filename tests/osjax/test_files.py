"""Files are whole or not there: errors inside the block, a full disk, a killed process, folders that refuse."""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile

import pytest

from osjax.errors import OsjaxError
from osjax.files import digest, make_folder, making_folder, replacing


def test_the_file_appears_when_the_block_ends(tmp_path):
    target = tmp_path / "new" / "folder" / "a.txt"
    with replacing(target) as temporary:
        temporary.write_text("whole")
        assert not target.exists()
        assert temporary.parent == target.parent
    assert target.read_text() == "whole"
    assert os.listdir(target.parent) == ["a.txt"]


def test_an_error_leaves_the_old_file_and_no_other(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")

    def write_and_fail() -> None:
        with replacing(target) as temporary:
            temporary.write_text("half")
            raise ValueError("on the way")

    with pytest.raises(ValueError, match="on the way"):
        write_and_fail()
    assert target.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


SLOW_WRITER = """
import sys, time
from osjax.files import replacing

with replacing(sys.argv[1]) as temporary:
    temporary.write_text("half")
    print("half", flush=True)
    time.sleep(60)
"""


def test_what_a_killed_process_left_is_removed_and_nothing_else(tmp_path):
    target = tmp_path / "a.mp4"
    with subprocess.Popen(
        [sys.executable, "-c", SLOW_WRITER, str(target)], stdout=subprocess.PIPE, text=True
    ) as writer:
        assert writer.stdout.readline() == "half\n"
        writer.kill()
    (left,) = os.listdir(tmp_path)
    assert left != "a.mp4"
    with replacing(tmp_path / "a.json") as other:
        other.write_text("being written at the same time")
        with replacing(target) as temporary:
            temporary.write_text("whole")
    assert sorted(os.listdir(tmp_path)) == ["a.json", "a.mp4"]


def test_the_longest_names_fit(tmp_path):
    with replacing(tmp_path / ("x" * 255)) as temporary:
        temporary.write_text("whole")
    assert os.listdir(tmp_path) == ["x" * 255]


def test_files_get_the_usual_permissions(tmp_path):
    with replacing(tmp_path / "ours") as temporary:
        temporary.write_text("")
    (tmp_path / "usual").write_text("")
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_file_in_the_place_of_a_folder_is_an_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OsjaxError, match=r"cannot make the folder .*file.*: choose another place"):
        make_folder(tmp_path / "file" / "folder")
    with pytest.raises(OsjaxError, match="cannot make the folder"), replacing(tmp_path / "file" / "a.txt"):
        pass


def test_a_folder_in_the_place_of_the_file_is_an_error(tmp_path):
    (tmp_path / "a.txt" / "inside").mkdir(parents=True)
    with pytest.raises(OsjaxError, match=r"cannot write .*a.txt"), replacing(tmp_path / "a.txt") as temporary:
        temporary.write_text("whole")
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_read_only_folder_is_an_error():
    folder = tempfile.mkdtemp()  # pytest's own folders are closed to other users
    os.chmod(folder, 0o555)
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(65534)  # root may write anywhere: ask as nobody
        # access() asks for the real user, so only the writing itself is refused here.
        with pytest.raises(OsjaxError, match="cannot"), replacing(f"{folder}/a.txt") as temporary:
            temporary.write_text("whole")
    finally:
        os.seteuid(user)
        left = os.listdir(folder)
        shutil.rmtree(folder)
    assert left == []


def test_a_folder_appears_when_the_block_ends(tmp_path):
    target = tmp_path / "new" / "folder"
    with making_folder(target) as temporary:
        (temporary / "inside").mkdir()
        (temporary / "inside" / "a.txt").write_text("whole")
        assert not target.exists()
    assert (target / "inside" / "a.txt").read_text() == "whole"
    assert os.listdir(target.parent) == ["folder"]


def test_no_half_of_a_folder_appears(tmp_path):
    def write_and_fail() -> None:
        with making_folder(tmp_path / "folder") as temporary:
            (temporary / "a.txt").write_text("half")
            raise ValueError("on the way")

    with pytest.raises(ValueError, match="on the way"):
        write_and_fail()
    assert os.listdir(tmp_path) == []


def test_what_a_killed_process_left_of_a_folder_is_removed(tmp_path):
    code = SLOW_WRITER.replace("replacing", "making_folder").replace("temporary.", "(temporary / 'a').")
    words = [sys.executable, "-c", code, str(tmp_path / "folder")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout.readline() == "half\n"
        writer.kill()
    assert len(os.listdir(tmp_path)) == 1
    with making_folder(tmp_path / "folder") as temporary:
        (temporary / "a").write_text("whole")
    assert os.listdir(tmp_path) == ["folder"]


def test_a_folder_takes_the_place_of_an_empty_one_only(tmp_path):
    (tmp_path / "folder").mkdir()
    with making_folder(tmp_path / "folder") as temporary:
        (temporary / "a.txt").write_text("whole")
    with pytest.raises(OsjaxError, match="exists"), making_folder(tmp_path / "folder"):
        pass
    with pytest.raises(OsjaxError, match="exists"), making_folder(tmp_path / "folder" / "a.txt"):
        pass
    assert (tmp_path / "folder" / "a.txt").read_text() == "whole"


def test_a_folder_is_replaced_by_a_whole_one_only(tmp_path):
    folder = tmp_path / "folder"

    def write(content: str, error: Exception | None = None) -> None:
        with making_folder(folder, replace=True) as temporary:
            (temporary / content).touch()
            assert not folder.exists() or os.listdir(folder) == ["first"]  # it is there until the new one is whole
            if error is not None:
                raise error

    write("first")
    with pytest.raises(OsjaxError, match="cannot write"):
        write("second", OSError(28, "No space left on device"))
    assert os.listdir(folder) == ["first"]
    write("third")
    assert os.listdir(folder) == ["third"]
    assert os.listdir(tmp_path) == ["folder"]


def test_digest(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert digest(tmp_path / "a") == hashlib.sha256(b"abc").hexdigest()
    with pytest.raises(OsjaxError, match="cannot read"):
        digest(tmp_path / "b")
