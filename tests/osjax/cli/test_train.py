"""The train command: where its outputs go, how a stopped run ends and goes on, and tables of clips."""

import csv
import json
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np

import osjax
from configs.train import base
from osjax.cli import main
from osjax.media import write_mp4

TINY = str(Path(osjax.__file__).parent / "assets" / "tiny")
# An adapter of the embedded model on single frames: what compiles soonest.
WORDS = ["train", base.__file__, "--ckpt_path", TINY, "--rank", "1", "--num_frames", "1", "--resolution", "96px"]
WORDS += ["--aspect_ratios", "1:1", "--batch_size", "1", "--dtype", "fp32", "--log_every", "1"]


def test_a_stopped_run_says_so_and_goes_on(tmp_path, capsys):
    out = str(tmp_path / "run")
    command = [sys.executable, "-m", "osjax.cli.main", *WORDS, "--steps", "100000", "--out", out]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        line = process.stdout.readline()
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=120)
    assert line.startswith("step 1/100000 "), errors
    assert process.returncode == 130
    (step,) = (int(path.name) for path in (tmp_path / "run" / "checkpoints").iterdir())
    assert errors.splitlines()[-1] == f"osjax: stopped and saved at step {step}: the same command goes on"
    # The schedule is constant, so that a run of fewer steps is the same run: this one has only its export to do.
    assert main.main([*WORDS, "--steps", str(step), "--out", out]) == 0
    assert capsys.readouterr().out == f"{out}/lora\n"
    assert (tmp_path / "run" / "lora" / "lora.json").exists()
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, step + 1))


def test_a_run_that_is_to_start_anew_leaves_an_old_one_alone(tmp_path, capsys):
    (tmp_path / "checkpoints" / "7").mkdir(parents=True)
    assert main.main([*WORDS, "--out", str(tmp_path), "--resume", "never"]) == 2
    assert "holds a run already" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoints"]


def test_a_table_of_clips(tmp_path, capsys):
    clips = tmp_path / "clips"
    for number in range(2):
        write_mp4(clips / f"{number}.mp4", np.zeros((5, 16, 32, 3), np.uint8), fps=8)
        (clips / f"{number}.txt").write_text(f"caption {number}\n")
    table = tmp_path / "data.csv"
    assert main.main(["train", "--prepare", str(table), str(clips)]) == 0
    assert capsys.readouterr().out == f"{table}\n"
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["path"], row["text"], row["num_frames"], row["width"]) for row in rows] == [
        (f"clips/{number}.mp4", f"caption {number}", "5", "32") for number in range(2)
    ]


def test_a_folder_without_clips_is_one_line(tmp_path, capsys):
    assert main.main(["train", "--prepare", str(tmp_path / "data.csv"), str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("\n") == 1
