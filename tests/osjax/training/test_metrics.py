"""What a run tells: each step once in the file, whatever was killed; events, samples, a bar on terminals only."""

import json
import math
import os
import pty
import subprocess
import sys
import termios
import time

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from osjax.errors import OsjaxError
from osjax.media.write import probe
from osjax.training.metrics import Metrics


def log_steps(folder, start, stop, total=10, **options):
    metrics = Metrics(folder, total, start, **options)
    for step in range(start + 1, stop + 1):
        metrics.log(step, {"loss": jnp.asarray(1 / step), "lr": 1e-5})
    return metrics


def lines(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_each_step_is_a_line(tmp_path):
    log_steps(tmp_path, 0, 3).close()
    assert lines(tmp_path) == [{"step": n, "loss": float(np.float32(1 / n)), "lr": 1e-5} for n in (1, 2, 3)]


def test_lines_are_on_the_disk_at_once(tmp_path):
    metrics = log_steps(tmp_path, 0, 2)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2]
    metrics.close()


@pytest.mark.parametrize("cut", ["", '{"step": 6, "lo', "{}"[:1]])
def test_a_resumed_run_has_each_step_once(tmp_path, cut):
    log_steps(tmp_path, 0, 5).close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(cut)
    log_steps(tmp_path, 3, 6).close()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3, 4, 5, 6]


def test_a_new_run_in_an_old_folder_starts_its_file_anew(tmp_path):
    log_steps(tmp_path, 0, 5).close()
    log_steps(tmp_path, 0, 1).close()
    assert [line["step"] for line in lines(tmp_path)] == [1]


def test_the_time_left_is_told_at_the_newest_pace(tmp_path, capsys):
    """A slow start, which compiles, is not taken for the pace of what follows."""
    metrics = Metrics(tmp_path, 10_000, log_every=2)
    time.sleep(2)
    for step in range(1, 5):
        metrics.log(step, {"loss": 1.0})
    metrics.close()
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith("step 2/10000 loss 1 left ")
    assert hours(first) > 1
    assert hours(second) < hours(first) / 10


def hours(line):
    """Hours left, of a line that ends in minutes:seconds or hours:minutes:seconds."""
    return sum(
        float(part) / 60**power for power, part in zip((2, 1, 0), line.split()[-1].split(":")[::-1], strict=False)
    )


def test_what_is_not_finite_is_null(tmp_path):
    metrics = Metrics(tmp_path, 2)
    metrics.log(1, {"loss": math.nan, "grad_norm": jnp.inf, "lr": np.float32(0.5)})
    metrics.close()
    assert lines(tmp_path) == [{"step": 1, "loss": None, "grad_norm": None, "lr": 0.5}]


def test_tensorboard_reads_the_events(tmp_path):
    log_steps(tmp_path, 0, 3).close()
    log_steps(tmp_path, 2, 4).close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert sorted(events.Tags()["tensors"]) == ["loss", "lr"]
    assert [event.step for event in events.Tensors("loss")] == [1, 2, 3, 3, 4]  # equal points, as a resume is exact


def test_without_tensorboard_a_run_goes_on(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboard.summary", None)
    log_steps(tmp_path, 0, 3).close()
    assert len(lines(tmp_path)) == 3
    assert capsys.readouterr().err.count("osjax[train]") == 1


def test_lines_on_stdout_every_so_many_steps(tmp_path, capsys):
    log_steps(tmp_path, 0, 7, log_every=3).close()
    out, err = capsys.readouterr()
    assert [line.split()[:4] for line in out.splitlines()] == [
        ["step", "3/10", "loss", "0.3333"],
        ["step", "6/10", "loss", "0.1667"],
    ]
    assert " left 00:0" in out
    assert err == "", "a bar where there is no terminal"


def read_terminal(reader):
    """The next piece of what was shown; nothing when the other end is closed, which Linux calls an error."""
    try:
        return os.read(reader, 1 << 16).decode()
    except OSError:
        return ""


def test_a_terminal_has_a_bar_with_the_time_left(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from osjax.training.metrics import Metrics\n"
        "metrics = Metrics(Path(sys.argv[1]), 4, 1)\n"
        "for step in (2, 3, 4): time.sleep(0.2); metrics.log(step, {'loss': 0.25})\n"
        "metrics.close()"
    )
    reader, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 120))
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], stderr=terminal, timeout=60, check=True)
    os.close(terminal)
    shown = "".join(iter(lambda: read_terminal(reader), ""))
    os.close(reader)
    assert "| 2/4 [00:00<00:0" in shown
    assert "| 4/4" in shown
    assert "loss 0.25" in shown


def test_sample_videos(tmp_path):
    metrics = Metrics(tmp_path, 10)
    metrics.video(5, "a_red_circle", np.zeros((5, 16, 32, 3), np.uint8), fps=12)
    metrics.video(5, "still", np.zeros((1, 16, 32, 3), np.uint8))
    metrics.close()
    video = probe(tmp_path / "samples" / "step_0000005_a_red_circle.mp4")
    assert (video.frames, video.height, video.width, video.fps) == (5, 16, 32, 12)
    assert probe(tmp_path / "samples" / "step_0000005_still.png").width == 32


def test_a_folder_that_refuses_is_one_line(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(OsjaxError, match="cannot write metrics") as error:
        Metrics(tmp_path, 1)
    assert "\n" not in str(error.value)
