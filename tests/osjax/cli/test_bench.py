"""`osjax bench`: what it prints and writes, and what it refuses."""

import json

import pytest

from osjax.cli import main

SMALL = ["--num_frames", "5", "--num_steps", "3", "--height", "16", "--width", "32", "--runs", "1"]


@pytest.mark.parametrize("weights", ["True", "False"])
def test_a_table_and_the_same_as_json(tmp_path, capsys, monkeypatch, weights):
    monkeypatch.chdir(tmp_path)
    words = ["bench", "tiny", *SMALL, "--dtype", "fp32", "--cond_type", "i2v_head", "--out", "folder/results.json"]
    if weights == "True":
        from osjax.pipeline import EMBEDDED

        words += ["--random-weights", "True", "--ckpt_path", str(EMBEDDED), "--precision", "int8"]
    assert main.main(words) == 0
    *lines, path = capsys.readouterr().out.splitlines()
    assert path == "folder/results.json"
    report = json.loads((tmp_path / path).read_text())
    assert [part["name"] for part in report["parts"]] == ["text", "reference", "step of 3", "decode"]
    assert {part["measured"] for part in report["parts"]} == {True}
    whole = sum(part["seconds"] * part["times"] for part in report["parts"])
    assert report["seconds"] == {"value": pytest.approx(whole), "measured": False}
    assert report["weights"] == ("random weights" if weights == "True" else "embedded tiny bundle")
    assert (report["dtype"], report["attention"], report["passes"]) == ("fp32", "xla", 9)
    assert report["precision"] == ("int8" if weights == "True" else "full")
    assert report["request"]["num_steps"] == 3
    for part in report["parts"]:
        line = next(line for line in lines if line.startswith(part["name"]))
        assert f"{part['seconds']:.3f}" in line
    assert lines[-1].startswith(f"a video: {whole:.2f} s, 9 forward passes; not run as a whole")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--runs", "0"], "--runs counts the calls that are timed"),
        (["--runs", "many"], "--runs: 'many' is not a whole number"),
        (["--random_weights", "maybe"], "neither True nor False"),
        (["--speed", "fast"], "leave out --speed"),
        (["--extend", "1", "--num_frames", "65"], "not its continuation"),
        (["--refine-prompt", "True"], "not a language model"),
        (["--dataset.data_path", "texts.csv"], "not a CSV"),
        (["--use_t2i2v", "True"], "not FLUX's pictures"),
        (["--from", "video.mp4"], "not a file"),
        (["--cond_type", "i2v"], "unknown cond_type 'i2v'"),
        (["--step", "3"], "did you mean --num_steps?"),
        (["--num_frames", "6"], "num_frames is 6"),
        (["--random_weights", "True", "--num_frames", "6"], "num_frames is 6"),
        (["--ckpt_path", "none"], "no bundle at none"),
        (["--ckpt_path", "none", "--random_weights", "True"], "no bundle at none"),
        (["--random_weights", "True", "--dtype", "int8"], "unknown dtype 'int8'"),
        (["--random_weights", "True", "--precision", "fp4"], "unknown precision 'fp4'"),
        (["--random_weights", "True", "--lora", "style"], "random weights have no LoRA"),
        (["--random_weights", "True", "--mesh", "data=64"], "mesh"),
    ],
)
def test_refusals(capsys, words, message):
    assert main.main(["bench", "tiny", *words]) == 2
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("osjax: error:")
    assert message in told


def test_help_tells_its_own_options(capsys):
    with pytest.raises(SystemExit) as ended:
        main.main(["bench", "--help"])
    assert ended.value.code == 0
    told = capsys.readouterr().out
    assert all(f"--{name}" in told for name in ("random_weights", "runs", "out"))
