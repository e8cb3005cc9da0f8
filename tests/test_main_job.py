"""The main job: upstream-format checkpoints in, mp4 files out, all by the command line, read back from the files."""

import csv
import json
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from osjax.cli.main import main
from osjax.media import write_mp4
from tests import upstream_folder
from tests.parity import cases

SIZE = ["--height", "32", "--width", "48", "--num_steps", "12", "--dtype", "fp32"]


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    names = ("mmdit_video", "hunyuan_vae", "text_t5", "text_clip")
    source = upstream_folder.write(folder / "ckpts", *(cases.load(name, cases.VENDORED) for name in names))
    assert main(["convert", str(source), str(folder / "bundle")]) == 0
    return folder / "bundle"


@pytest.fixture(scope="module")
def refs(tmp_path_factory):
    """Two pictures and a clip of 33 frames."""
    folder = tmp_path_factory.mktemp("refs")
    rng = np.random.default_rng(0)
    for name in ("first.png", "last.png"):
        Image.fromarray(rng.integers(0, 255, (50, 64, 3), np.uint8)).save(folder / name)
    write_mp4(folder / "clip.mp4", rng.integers(0, 255, (33, 48, 64, 3), np.uint8), 24)
    return folder


def generate(bundle, out, *words) -> list[Path]:
    assert main(["generate", "tiny", "--ckpt_path", str(bundle), "--save-dir", str(out), *SIZE, *words]) == 0
    return sorted(out.rglob("*.mp4"))


def measured(path: Path) -> tuple[int, int, int, float]:
    """Frames counted by decoding, height, width, frames a second; by PyAV alone, not by osjax's own reader."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        return len(frames), *frames[0].shape[:2], float(stream.average_rate)


@pytest.mark.parametrize(
    ("cond_type", "given", "frames", "passes"),
    [
        ("t2v", [], 9, 12 * 2 - 1),
        ("i2v_head", ["first.png"], 9, 12 * 3 - 2),
        ("i2v_tail", ["last.png"], 9, 12 * 3 - 2),
        ("i2v_loop", ["first.png", "last.png"], 9, 12 * 3 - 2),
        ("v2v_head", ["clip.mp4"], 37, 12 * 3 - 2),
        ("v2v_tail", ["clip.mp4"], 37, 12 * 3 - 2),
    ],
)
def test_a_playable_video(bundle, refs, tmp_path, cond_type, given, frames, passes):
    """Step 11 is the one odd step from 10 on: oscillation leaves it a single pass."""
    ref = ["--ref", ";".join(str(refs / name) for name in given)] if given else []
    (path,) = generate(
        bundle, tmp_path, "--prompt", "waves", "--cond_type", cond_type, "--num_frames", str(frames), *ref
    )
    assert measured(path) == (frames, 32, 48, 24.0)
    told = json.loads(path.with_suffix(".json").read_text())
    assert told["forward_passes"] == passes
    assert [ref["name"] for ref in told["refs"]] == given
    assert path.with_suffix(".txt").read_text() == "waves. 24 FPS. 4 motion score."


def test_a_long_video(bundle, refs, tmp_path):
    words = ["--cond_type", "v2v_head", "--ref", str(refs / "clip.mp4"), "--num_frames", "37", "--extend", "2"]
    (path,) = generate(bundle, tmp_path, "--prompt", "waves", *words)
    assert measured(path) == (45, 32, 48, 24.0)
    told = json.loads(path.with_suffix(".json").read_text())
    assert (told["num_frames"], told["request"]["extend"], told["forward_passes"]) == (45, 2, 3 * (12 * 3 - 2))


def test_a_csv_of_three_rows(bundle, refs, tmp_path):
    table = tmp_path / "prompts.csv"
    with table.open("w", newline="", encoding="utf-8-sig") as file:
        writer = csv.writer(file)
        writer.writerows([["text", "ref", "name"], ["a, quoted\nprompt", "first.png", "one"]])
        writer.writerows([["“second”", str(refs / "last.png"), ""], ["third", str(refs / "first.png"), "three"]])
    (tmp_path / "first.png").write_bytes((refs / "first.png").read_bytes())
    words = ["--dataset.data-path", str(table), "--cond_type", "i2v_head", "--num_frames", "9", "--batch_size", "2"]
    paths = generate(bundle, tmp_path / "out", *words, "--fps_save", "12")
    assert [path.stem for path in paths] == ["one", "prompts_0001", "three"]
    assert [measured(path) for path in paths] == [(9, 32, 48, 12.0)] * 3
    assert paths[1].with_suffix(".txt").read_text() == "“second”. 12 FPS. 4 motion score."
