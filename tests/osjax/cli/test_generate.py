"""`osjax generate` from options to files, with the embedded bundle: names, batches, resuming, repeating."""

import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from osjax import media, provenance
from osjax.cli import generate, main, options
from osjax.errors import OsjaxError
from osjax.pipeline import Pipeline
from osjax.video import Video

# Two latent frames, one tile of the autoencoder: quick to compile.
SMALL = ["--num_frames", "5", "--num_steps", "2", "--height", "16", "--width", "32"]


def plan(*words):
    return generate.plan(options.read([str(word) for word in words]).config)


def csv(tmp_path, *lines):
    path = tmp_path / "rows.csv"
    path.write_text("\n".join(lines) + "\n")
    return path


def stems(tmp_path, jobs):
    return [job.stem.relative_to(tmp_path).as_posix() for job in jobs]


def times(folder):
    """When each video of a folder was written, in nanoseconds."""
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("*.mp4")}


def make(tmp_path, *words):
    return main.main(["generate", "--save_dir", str(tmp_path / "out"), *SMALL, *map(str, words)])


def test_a_prompt_becomes_requests(tmp_path):
    made = plan("256px", "--prompt", "a cat", "--save_dir", tmp_path, "--num_sample", 3, "--seed", 5, "--fps_save", 16)
    assert stems(tmp_path, made.jobs) == [f"video_256px/prompt_0000{end}" for end in ("", "_1", "_2")]
    assert [job.request.seed for job in made.jobs] == [5, 6, 7]
    request = made.jobs[0].request
    assert (request.prompt, request.fps, request.num_frames, request.cond_type) == ("a cat", 16, 129, "t2v")
    assert (request.resolution, request.aspect_ratio, request.height, request.refs) == ("256px", "16:9", None, ())


def test_the_seed_of_the_section_wins():
    assert plan("--prompt", "a", "--seed", 5, "--sampling_option.seed", 0).jobs[0].request.seed == 0


def test_a_csv_becomes_requests(tmp_path):
    (tmp_path / "a.png").touch()
    path = csv(tmp_path, "text,ref,name", "one,,", 'two,"a.png;a.png",both', "three,a.png,", "four,,")
    made = plan("--dataset.data-path", path, "--start_index", 1, "--end_index", 3, "--save_dir", tmp_path)
    assert stems(tmp_path, made.jobs) == ["video_96px/both", "video_96px/rows_0002"]
    assert [len(job.request.refs) for job in made.jobs] == [2, 1]
    assert [job.request.prompt for job in made.jobs] == ["two", "three"]


def test_rows_set_options_of_their_own(tmp_path):
    (tmp_path / "a.png").touch()
    path = csv(
        tmp_path,
        "text,ref,num-frames,seed,cond_type,motion_score,sampling_option.num_steps,guidance,resolution,text_osci,fps-save",
        "one,,,,,,,,,,",
        "two,a.png,9,7,i2v_head,6.5,3,2,256px,False,12",
        "three,,1,,,,,,,,",
    )
    words = ["256px", "--save_dir", tmp_path, "--resolution", "768px", "--negative_prompt", "blur"]
    made = plan(*words, "--dataset.data-path", path, "--sampling_option.seed", 5, "--num_sample", 2)
    assert stems(tmp_path, made.jobs[::2]) == [
        f"{folder}/rows_000{index}" for index, folder in enumerate(("video_768px", "video_256px", "image_768px"))
    ]
    one, _, two, again, three, _ = [job.request for job in made.jobs]
    assert one == plan(*words, "--prompt", "one", "--seed", 5).jobs[0].request
    assert (two.num_frames, two.seed, two.cond_type, two.motion_score) == (9, 7, "i2v_head", "6.5")
    assert (two.num_steps, two.guidance, two.resolution, two.text_osci, two.fps) == (3, 2.0, "256px", False, 12)
    assert (two.negative_prompt, again.seed) == ("blur", 8)
    assert (three.num_frames, three.seed) == (1, 5)


def test_a_row_tells_its_size_in_either_way(tmp_path):
    path = csv(tmp_path, "text,resolution,height,width", "a,,,", "b,,32,64", "c,256px,,")
    sizes = [
        (job.request.resolution, job.request.aspect_ratio, job.request.height, job.request.width)
        for job in plan("768px", "--dataset.data-path", path).jobs
    ]
    assert sizes == [("768px", "16:9", None, None), (None, None, 32, 64), ("256px", "16:9", None, None)]


@pytest.mark.parametrize(
    ("header", "cells", "message"),
    [
        ("num_frames", "many", "rows.csv, line 3: num_frames: 'many' is not a whole number"),
        ("num_frames", "6", "rows.csv, line 3: num_frames is 6"),
        ("guidance", "nan", "line 3: guidance: 'nan' is not a finite number"),
        ("seed", "None", "line 3: seed: 'None' is not a whole number"),
        ("resolution,height,width", "256px,32,32", "line 3: the size is given twice"),
        ("height", "32", "line 3: no size"),
        ("dtype", "fp32", "line 1: column 'dtype': this is an option of the whole command"),
        ("refine.model", "x", "line 1: column 'refine.model': this is an option of the whole command"),
        ("batch-size", "", "line 1: column 'batch-size': this is .* and give --batch_size"),
        ("prompt", "x", "line 1: column 'prompt': the prompts of a CSV stand in its column 'text'"),
    ],
)
def test_mistakes_of_rows_are_told_with_their_line(tmp_path, header, cells, message):
    path = csv(tmp_path, f"text,{header}", "fine", f"b,{cells}")
    with pytest.raises(OsjaxError, match=message):
        plan("256px", "--dataset.data-path", path)


def test_what_the_model_cannot_draw_is_told_before_the_first_video(tmp_path, capsys):
    path = csv(tmp_path, "text,cond_type", "a,", "b,i2v_haed")
    assert make(tmp_path, "--dataset.data_path", path) == 2
    assert "rows.csv, line 3: unknown cond_type 'i2v_haed': did you mean i2v_head?" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_mixed_rows_are_drawn_in_groups_and_completed(tmp_path, capsys):
    Image.fromarray(np.arange(40 * 50 * 3, dtype=np.uint8).reshape(40, 50, 3)).save(tmp_path / "a.png")
    lines = ["a,,,,", "b,a.png,i2v_head,,", "c,,,1,", "d,,,,", "e,a.png,i2v_head,,", "f,,,,7"]
    path = csv(tmp_path, "text,ref,cond_type,num_frames,seed", *lines)
    words = ["--dataset.data_path", path, "--batch_size", "2"]
    assert make(tmp_path, *words) == 0
    out = tmp_path / "out"
    made = [Path(line).relative_to(out).as_posix() for line in capsys.readouterr().out.split()]
    folders = {".mp4": "video_32x16", ".png": "image_32x16"}
    names = ("rows_0000.mp4", "rows_0003.mp4", "rows_0001.mp4", "rows_0004.mp4", "rows_0002.png", "rows_0005.mp4")
    assert made == [f"{folders[name[-4:]]}/{name}" for name in names]
    told = [provenance.read(out / name) for name in made]
    assert [(each.batch_size, each.batch_index) for each in told] == [(2, 0), (2, 1), (2, 0), (2, 1), (1, 0), (1, 0)]
    assert [each.request["cond_type"] for each in told] == ["t2v"] * 2 + ["i2v_head"] * 2 + ["t2v"] * 2
    assert told[5].request["seed"] == told[5].seed == 7

    (out / made[1]).unlink()
    before = times(out / "video_32x16")
    assert make(tmp_path, *words) == 0
    assert provenance.read(out / made[1]).frames_sha256 == told[1].frames_sha256, "its group is what it was"
    assert before.items() <= times(out / "video_32x16").items()


def test_references_that_cannot_be_used_are_told_before_the_first_video(tmp_path, capsys):
    (tmp_path / "a.png").write_text("no picture")
    path = csv(tmp_path, "text,ref,cond_type", "a,,", "b,a.png,i2v_head")
    assert make(tmp_path, "--dataset.data_path", path) == 2
    assert "rows.csv, line 3: " in (told := capsys.readouterr().err)
    assert "a.png is not a readable image" in told
    assert not [each for each in (tmp_path / "out").rglob("*") if each.is_file()]


def test_a_video_of_8_bits_is_told_apart_and_repeated_in_them(tmp_path, capsys):
    """A video that is there is another one in another precision; `--from` takes up the one that it was made in."""
    digests = []
    for precision in ("full", "int8", "int8"):
        assert make(tmp_path, "--prompt", "a", "--precision", precision) == 0
        (video,) = (tmp_path / "out").rglob("*.mp4")
        told = provenance.read(video)
        assert (told.precision, told.approximate) == (precision, precision != "full")
        assert ("precision int8 is approximate" in capsys.readouterr().err) == told.approximate
        digests.append((told.frames_sha256, video.stat().st_mtime_ns))
    assert digests[0][0] != digests[1][0]
    assert digests[1] == digests[2]
    assert main.main(["generate", "--from", str(video), "--save_dir", str(tmp_path / "again")]) == 0
    again = provenance.read(capsys.readouterr().out.strip())
    assert (again.precision, again.frames_sha256) == ("int8", digests[1][0])


def test_the_folder_says_what_and_how_big(tmp_path):
    def folder(*words):
        return plan("--prompt", "a", "--save_dir", tmp_path, *words).jobs[0].stem.parent.name

    assert folder("--num_frames", 1) == "image_96px"
    assert folder("--height", 32, "--width", 48) == "video_48x32"
    assert folder("--resolution", "768px", "--aspect_ratio", "1:1") == "video_768px"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "nothing to make"),
        (["--prompt", "a", "--dataset.data_path", "rows.csv"], "leave out --prompt and --ref"),
        (["--dataset.data_path", "rows.csv", "--ref", "a.png"], "leave out --prompt and --ref"),
        (["--prompt", "a", "--batch_size", "0"], "give numbers above 0"),
        (["--prompt", "a", "--num_sample", "0"], "give numbers above 0"),
        (["--prompt", "a", "--ref", "a;b;c"], "3 references"),
        (["--prompt", "a", "--start_index", "1"], "no row from 1"),
        (["--prompt", "a", "--height", "64"], "no size"),
    ],
)
def test_what_cannot_be_planned(words, message):
    with pytest.raises(OsjaxError, match=message):
        plan(*words)


def test_a_batch_is_completed_and_kept(tmp_path, capsys):
    path = csv(tmp_path, "text,name", "a cat,", "a dog,dog", "rain,", "snow,")
    words = ["--dataset.data_path", path, "--batch_size", "2"]
    folder = tmp_path / "out" / "video_32x16"
    assert make(tmp_path, *words) == 0
    printed = capsys.readouterr()
    names = ("rows_0000", "dog", "rows_0002", "rows_0003")
    assert printed.out.split() == [str(folder / f"{name}.mp4") for name in names]
    assert "embedded tiny bundle" in printed.err
    first = times(folder)
    for name in first:
        info = media.probe(folder / name)
        assert (info.frames, info.height, info.width, info.fps) == (5, 16, 32, 24)

    (folder / "dog.mp4").unlink()
    (folder / "rows_0002.mp4").write_bytes(b"of another program")
    assert make(tmp_path, *words) == 0
    second = times(folder)
    assert second.keys() == first.keys()
    assert {name for name in first if first[name] == second[name]} == {"rows_0000.mp4", "rows_0003.mp4"}

    assert make(tmp_path, *words, "--seed", "1") == 0
    third = times(folder)
    assert not [name for name in first if second[name] == third[name]], "another seed is another video"


def test_a_killed_batch_is_completed(tmp_path):
    path = csv(tmp_path, "text", *(f"prompt {index}" for index in range(4)))
    folder = tmp_path / "out" / "video_32x16"
    words = ["generate", *SMALL, "--dataset.data_path", str(path), "--save_dir", str(tmp_path / "out")]
    process = subprocess.Popen([sys.executable, "-m", "osjax.cli.main", *words])
    while not list(folder.glob("*.mp4")):
        assert process.poll() is None, "ended before it could be killed"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait(timeout=60)
    before = times(folder)
    assert 0 < len(before) < 4
    assert main.main(words) == 0
    after = times(folder)
    assert len(after) == 4
    assert before.items() <= after.items(), "a finished video was made again"
    assert len(list(folder.iterdir())) == 12, "an mp4, a json and a txt of each, and nothing half-written"


def test_a_video_is_written_while_the_next_is_drawn(tmp_path, monkeypatch, capsys):
    """Its encoding waits here until the next one's sampling has begun, and that until the writing has."""
    run, save = Pipeline.run, Video.save
    drawing, writing = threading.Semaphore(0), threading.Semaphore(0)
    begun = []

    def noted_run(self, requests, texts=None):
        begun.append(requests[0].prompt)
        if len(begun) > 1:
            drawing.release()
            assert writing.acquire(timeout=60)
        return run(self, requests, texts)

    def noted_save(self, stem):
        if self.provenance.prompt != "rain":
            writing.release()
            assert drawing.acquire(timeout=60)
        return save(self, stem)

    monkeypatch.setattr(Pipeline, "run", noted_run)
    monkeypatch.setattr(Video, "save", noted_save)
    assert make(tmp_path, "--dataset.data_path", csv(tmp_path, "text,name", "a cat,a", "a dog,b", "rain,c")) == 0
    assert [Path(line).stem for line in capsys.readouterr().out.split()] == ["a", "b", "c"]
    assert begun == ["a cat", "a dog", "rain"]


@pytest.mark.parametrize("bad", ["a cat", "a dog"])
def test_a_video_that_cannot_be_written_ends_the_batch_and_others_stand(tmp_path, monkeypatch, capsys, bad):
    save = Video.save

    def refuse(self, stem):
        if self.provenance.prompt == bad:
            raise OsjaxError("the disk is full: make room")
        return save(self, stem)

    monkeypatch.setattr(Video, "save", refuse)
    assert make(tmp_path, "--dataset.data_path", csv(tmp_path, "text", "a cat", "a dog", "rain")) == 2
    assert "error: the disk is full: make room" in capsys.readouterr().err
    assert len(times(tmp_path / "out" / "video_32x16")) == (0 if bad == "a cat" else 1)


def test_an_image_and_a_reference(tmp_path):
    ref = tmp_path / "ref.png"
    Image.fromarray(np.arange(40 * 50 * 3, dtype=np.uint8).reshape(40, 50, 3)).save(ref)
    assert make(tmp_path, "--prompt", "a", "--num_frames", "1") == 0
    assert media.probe(tmp_path / "out" / "image_32x16" / "prompt_0000.png").frames == 1
    assert make(tmp_path, "--prompt", "a", "--cond_type", "i2v_head", "--ref", ref) == 0
    found = provenance.read(tmp_path / "out" / "video_32x16" / "prompt_0000.json")
    assert (found.cond_type, [each.name for each in found.refs]) == ("i2v_head", ["ref.png"])


def test_from_repeats_the_frames(tmp_path, capsys):
    path = csv(tmp_path, "text", "a dog", "a cat", "rain")
    assert make(tmp_path, "--dataset.data_path", path, "--batch_size", "3", "--seed", "3", "--num_steps", "4") == 0
    video = tmp_path / "out" / "video_32x16" / "rows_0001.mp4"
    assert main.main(["generate", "--from", str(video), "--save_dir", str(tmp_path / "out")]) == 0
    assert "same frames, bit for bit" in capsys.readouterr().err
    again = video.with_name("rows_0001_again.mp4")
    assert provenance.read(again).frames_sha256 == provenance.read(video).frames_sha256
    assert provenance.read(again).request == provenance.read(video).request
    # The last bits may depend on how many are drawn together, so that is repeated too.
    assert (provenance.read(again).batch_size, provenance.read(again).batch_index) == (3, 1)

    assert main.main(["info", str(video)]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert (shown["prompt"], shown["seed"], shown["num_frames"]) == ("a cat", 3, 5)

    record = video.with_suffix(".json")
    for change, message in (
        ({"bundle_sha256": "0"}, "made with another bundle"),
        ({"request": {"colour": "red", "refs": []}}, "made with other options"),
    ):
        record.write_text(json.dumps(shown | change))
        assert main.main(["generate", "--from", str(record), "--save_dir", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err


def test_a_video_whose_blocks_came_one_by_one_is_repeated_so(tmp_path, capsys):
    assert make(tmp_path, "--prompt", "a", "--offload", "True", "--offload_blocks", "True") == 0
    video = tmp_path / "out" / "video_32x16" / "prompt_0000.mp4"
    assert provenance.read(video).in_blocks
    offload = ["--offload", "True"]
    for words in (offload, [*offload, "--offload_blocks", "True"], []):
        assert main.main(["generate", "--from", str(video), "--save_dir", str(tmp_path / "out"), *words]) == 0
        assert not words or "same frames, bit for bit" in capsys.readouterr().err
        assert provenance.read(video.with_name("prompt_0000_again.mp4")).in_blocks == bool(words)


def test_rows_are_extended_kept_and_repeated(tmp_path, capsys):
    path = csv(tmp_path, "text,extend", "a cat,1", "a dog,", "rain,1")
    words = ["--dataset.data_path", path, "--batch_size", "2", "--num_frames", "37"]
    assert make(tmp_path, *words) == 0
    folder = tmp_path / "out" / "video_32x16"
    names = [f"rows_000{index}.mp4" for index in range(3)]
    assert [media.probe(folder / name).frames for name in names] == [41, 37, 41]
    told = provenance.read(folder / names[2])
    assert (told.num_frames, told.request["extend"], told.batch_size, told.batch_index) == (41, 1, 2, 1)

    first = times(folder)
    (folder / names[0]).unlink()
    assert make(tmp_path, *words) == 0
    second = times(folder)
    assert [first[name] == second[name] for name in names] == [False, True, True]

    assert main.main(["generate", "--from", str(folder / names[2]), "--save_dir", str(tmp_path / "out")]) == 0
    assert "same frames, bit for bit" in capsys.readouterr().err
    path.write_text("text,extend\na cat,\na dog,\nrain,\n")
    assert make(tmp_path, *words) == 0
    third = times(folder)
    assert [second[name] == third[name] for name in names] == [False, True, False], "one that is longer is another"
    assert media.probe(folder / names[0]).frames == 37


def test_what_cannot_be_extended_is_told_before_anything_is_drawn(tmp_path, capsys):
    path = csv(tmp_path, "text,extend,num_frames", "a,,", "b,2,33")
    assert make(tmp_path, "--dataset.data_path", path) == 2
    assert "rows.csv, line 3: num_frames is 33: to extend a video" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_from_takes_no_other_options(tmp_path):
    with pytest.raises(OsjaxError, match=r"leave out --sampling_option\.num_steps, --seed"):
        generate.plan_repeat(options.read(["--from", "x.mp4", "--seed", "1", "--num_steps", "2"]))


def test_an_output_folder_that_cannot_be(tmp_path, capsys):
    (tmp_path / "out").write_text("a file stands here")
    assert make(tmp_path, "--prompt", "a") == 2
    assert "cannot make the folder" in capsys.readouterr().err
