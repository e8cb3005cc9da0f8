"""Results tell how they came to be, and are finished exactly if their video is there."""

import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from osjax import provenance
from osjax.errors import OsjaxError
from osjax.media import probe, read_clip, write_mp4
from osjax.provenance import Provenance, Reference, UsedLoRA, is_finished, result_path, write_outputs

EXAMPLE = Provenance(
    prompt="rain",
    prompt_used="rain. 24 FPS. 4 motion score.",
    negative_prompt="",
    seed=7,
    height=32,
    width=48,
    num_frames=5,
    fps=24,
    steps=50,
    guidance={"text": 7.5, "image": 3.0, "text_osci": True, "flow_shift": None},
    cond_type="i2v_head",
    refs=(Reference("a.png", "0" * 64),),
    forward_passes=110,
    seconds={"text": 0.5, "denoise": 10.25},
    bundle="tiny",
    bundle_sha256="1" * 64,
    osjax_version="0.1.0",
    jax_version="0.10.2",
    device="cpu",
    mesh={"data": 2, "seq": 4},
    dtype="bfloat16",
    attention="reference",
    batch_size=2,
    batch_index=1,
    request={"prompt": "rain", "refs": ["a.png"], "seed": 7},
)
FRAMES = np.random.default_rng(0).integers(0, 256, (5, 32, 48, 3), dtype=np.uint8)


@given(
    st.text(st.characters(exclude_categories=["Cs"])),
    st.dictionaries(st.text(), st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False)),
    st.lists(st.builds(Reference, st.text(), st.text())).map(tuple),
    st.lists(st.builds(UsedLoRA, st.text(), st.floats(allow_nan=False), st.text())).map(tuple),
)
def test_json_round_trip(prompt, guidance, refs, loras):
    given_provenance = dataclasses.replace(EXAMPLE, prompt=prompt, guidance=guidance, refs=refs, loras=loras)
    assert Provenance.from_json(given_provenance.to_json()) == given_provenance


def test_what_was_written_before_there_were_loras_is_read():
    values = json.loads(EXAMPLE.to_json())
    del values["loras"]
    assert Provenance.from_json(json.dumps(values)) == EXAMPLE


def test_json_is_readable():
    text = dataclasses.replace(EXAMPLE, prompt="雨").to_json()
    assert "雨" in text
    assert json.loads(text)["mesh"] == {"data": 2, "seq": 4}


def drop_a_field(values: dict) -> None:
    del values["seed"]


def add_a_field(values: dict) -> None:
    values["later"] = 1


def break_a_reference(values: dict) -> None:
    values["refs"] = [{"name": "a"}]


@pytest.mark.parametrize("change", [drop_a_field, add_a_field, break_a_reference])
def test_other_fields_are_refused(tmp_path, change):
    values = json.loads(EXAMPLE.to_json())
    change(values)
    with pytest.raises(ValueError, match="not the fields of a provenance"):
        Provenance.from_json(json.dumps(values))


def test_a_video_its_record_and_its_prompt(tmp_path):
    stem = tmp_path / "out" / "cat.v1"
    files = write_outputs(stem, iter(FRAMES), EXAMPLE)
    assert files == [tmp_path / "out" / f"cat.v1{ending}" for ending in (".mp4", ".json", ".txt")]
    assert sorted(os.listdir(stem.parent)) == ["cat.v1.json", "cat.v1.mp4", "cat.v1.txt"]
    info = probe(files[0])
    assert (info.frames, info.height, info.width, info.fps) == (5, 32, 48, 24.0)
    expected = dataclasses.replace(EXAMPLE, frames_sha256=hashlib.sha256(FRAMES.tobytes()).hexdigest())
    assert provenance.read(files[0]) == provenance.read(files[1]) == expected
    assert files[2].read_text() == "rain. 24 FPS. 4 motion score."


def test_a_single_frame_is_an_image(tmp_path):
    single = dataclasses.replace(EXAMPLE, num_frames=1)
    image, record, _ = write_outputs(tmp_path / "a", FRAMES[:1], single)
    assert image.name == "a.png"
    np.testing.assert_array_equal(np.asarray(Image.open(image)), FRAMES[0])
    assert provenance.read(image) == provenance.read(record)
    assert provenance.read(image).frames_sha256 == hashlib.sha256(FRAMES[:1].tobytes()).hexdigest()


def test_equal_results_give_equal_files_and_replace_each_other(tmp_path):
    first = [file.read_bytes() for file in write_outputs(tmp_path / "a", FRAMES, EXAMPLE)]
    assert [file.read_bytes() for file in write_outputs(tmp_path / "a", FRAMES, EXAMPLE)] == first
    write_outputs(tmp_path / "a", FRAMES, dataclasses.replace(EXAMPLE, seed=8))
    assert provenance.read(tmp_path / "a.mp4").seed == provenance.read(tmp_path / "a.json").seed == 8


@pytest.mark.parametrize("announced", [1, 4, 6])
def test_a_wrong_number_of_frames_changes_nothing(tmp_path, announced):
    with pytest.raises(ValueError, match=r"frames where|too many values"):
        write_outputs(tmp_path / "a", FRAMES, dataclasses.replace(EXAMPLE, num_frames=announced))
    assert os.listdir(tmp_path) == []


def test_a_failure_leaves_the_older_result_whole(tmp_path):
    files = write_outputs(tmp_path / "a", FRAMES, EXAMPLE)
    before = [file.read_bytes() for file in files]

    def frames():
        yield FRAMES[0]
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        write_outputs(tmp_path / "a", frames(), dataclasses.replace(EXAMPLE, prompt_used="other", seed=9))
    assert [file.read_bytes() for file in files] == before
    assert len(os.listdir(tmp_path)) == 3


def test_finished_means_the_video_is_there(tmp_path):
    assert not is_finished(tmp_path / "a", 5)
    (tmp_path / "a.json").write_text("{}")
    (tmp_path / "a.png").write_bytes(b"")
    assert not is_finished(tmp_path / "a", 5)
    write_outputs(tmp_path / "a", FRAMES, EXAMPLE)
    assert is_finished(tmp_path / "a", 5)
    assert result_path(tmp_path / "a", 5) == tmp_path / "a.mp4"


WRITER = """
import sys
from osjax.provenance import write_outputs
from tests.osjax.test_provenance import EXAMPLE, FRAMES

for number in range(10_000):
    write_outputs(f"{sys.argv[1]}/{number}", FRAMES, EXAMPLE)
    print(number, flush=True)
"""


@pytest.mark.parametrize("delay", [0, 0.004, 0.012])  # seconds: somewhere in the writing of the next result
def test_kill_9_leaves_whole_results_only_and_a_rerun_tidies_up(tmp_path, delay):
    with subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True) as writer:
        while writer.stdout.readline() != "3\n":
            assert writer.poll() is None
        time.sleep(delay)
        writer.send_signal(signal.SIGKILL)
    finished = [number for number in range(10_000) if is_finished(tmp_path / str(number), 5)]
    assert finished == list(range(len(finished)))
    assert len(finished) >= 4
    for number in finished:
        assert provenance.read(tmp_path / f"{number}.mp4") == provenance.read(tmp_path / f"{number}.json")
        assert len(read_clip(tmp_path / f"{number}.mp4", 5, 32, 48)) == 5
        assert (tmp_path / f"{number}.txt").read_text() == EXAMPLE.prompt_used
    write_outputs(tmp_path / str(len(finished)), FRAMES, EXAMPLE)
    names = {f"{number}.{ending}" for number in range(len(finished) + 1) for ending in ("json", "mp4", "txt")}
    assert set(os.listdir(tmp_path)) == names


def test_files_without_provenance_are_refused(tmp_path):
    write_mp4(tmp_path / "plain.mp4", FRAMES, 24, comment="made by hand")
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    (tmp_path / "plain.json").write_text("[1]")
    (tmp_path / "broken.json").write_bytes(b"\xff{")
    for name in ("plain.mp4", "plain.png", "plain.json", "broken.json"):
        with pytest.raises(OsjaxError, match=rf"{name} holds no provenance .*: give a file that osjax wrote"):
            provenance.read(tmp_path / name)
    for name in ("none.mp4", "none.json"):
        with pytest.raises(OsjaxError, match="no such file"):
            provenance.read(tmp_path / name)


def test_a_reference_is_known_by_name_and_content(tmp_path):
    (tmp_path / "a.png").write_bytes(b"abc")
    assert Reference.of(tmp_path / "a.png") == Reference("a.png", hashlib.sha256(b"abc").hexdigest())
    with pytest.raises(OsjaxError, match="cannot read"):
        Reference.of(tmp_path / "b.png")
