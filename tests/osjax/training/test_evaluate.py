"""Evaluation of a draughtsman who draws the truth, of one who does not, and of the embedded bundle."""

import dataclasses
import json
import math
import types
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from tqdm import tqdm

from osjax.media import read_image, to_uint8
from osjax.request import Request
from osjax.sampling.geometry import image_size
from osjax.training import evaluate
from osjax.training.drawing import draw_clip
from osjax.training.evaluate import Artist, held_out_prompts
from osjax.training.shapes import is_held_out

PROMPTS = held_out_prompts(12, 0)
BASE = Request(prompt="-", **evaluate.CLIP)


class Draughtsman:
    """Draws what the prompts' scenes are, seen through `change`; keeps the requests that it got."""

    def __init__(self, change=lambda frames: frames):
        self.change, self.requests = change, []
        self.scenes = {prompt.caption: prompt.scene for prompt in PROMPTS}

    def shape(self, request):
        return types.SimpleNamespace(size=image_size(request.resolution, request.aspect_ratio))

    def run(self, requests):
        self.requests += requests
        return [types.SimpleNamespace(frames=self.change(self.draw(request))) for request in requests]

    def draw(self, request):
        size = self.shape(request).size
        for path in request.refs:  # must be there while the video is drawn
            assert read_image(path, *size).shape == (1, *size, 3)
        return draw_clip(self.scenes[request.prompt], *size)

    def encode_references(self, request, clips):
        return clips

    def decode(self, z_bthwc):
        return np.stack([self.change(to_uint8(clip)) for clip in z_bthwc])


def artist(pipeline, mistakes=None):
    return Artist(pipeline, BASE, 5, tqdm(disable=True), mistakes, ThreadPoolExecutor(2))


def test_prompts_are_held_out_and_repeatable():
    assert held_out_prompts(12, 0) == PROMPTS == held_out_prompts(20, 0)[:12]
    assert {len(prompt.scene.things) for prompt in PROMPTS} == {1, 2}
    for thing in (thing for prompt in PROMPTS for thing in prompt.scene.things):
        assert is_held_out(thing.color, thing.shape, thing.motion)


@pytest.mark.parametrize("ratio", evaluate.ASPECT_RATIOS)
def test_the_truth_gets_full_marks(ratio, tmp_path):
    pipeline = Draughtsman()
    figures = evaluate.text_scores(artist(pipeline, tmp_path), PROMPTS, ratio)
    assert figures.pop("speed") > 0.95
    assert figures.pop("prompts") == len(PROMPTS)
    assert set(figures.values()) == {100.0}
    assert not list(tmp_path.iterdir())
    assert [each.motion_score for each in pipeline.requests] == [str(each.scene.score) for each in PROMPTS]
    assert [each.seed for each in pipeline.requests] == list(range(len(PROMPTS)))
    assert {each.aspect_ratio for each in pipeline.requests} == {ratio}


def test_a_clip_played_backwards_moves_wrongly(tmp_path):
    figures = evaluate.text_scores(artist(Draughtsman(lambda frames: frames[::-1]), tmp_path), PROMPTS, "1:1")
    symmetric = [
        p.scene.things[0].motion in ("still", "bouncing", "spinning") for p in PROMPTS if len(p.scene.things) == 1
    ]
    assert figures["motion"] == figures["all_three"] == pytest.approx(100 * np.mean(symmetric), abs=0.1)
    assert figures["color"] == figures["shape"] == figures["background"] == 100.0
    assert list(tmp_path.glob("t2v-1x1-*.mp4"))


@pytest.mark.parametrize(("cond_type", "references"), [("i2v_head", 1), ("i2v_tail", 1), ("i2v_loop", 2)])
def test_given_frames_are_compared(cond_type, references):
    pipeline = Draughtsman()
    figures = evaluate.image_scores(artist(pipeline), PROMPTS[:4], cond_type)
    assert figures == {"prompts": 4, "given_frames_psnr": math.inf, "kept": 100.0}
    assert {len(request.refs) for request in pipeline.requests} == {references}
    brighter = Draughtsman(lambda frames: (frames * 0.5 + 100).astype(np.uint8))
    assert evaluate.image_scores(artist(brighter), PROMPTS[:4], cond_type)["given_frames_psnr"] < 20


def test_the_right_ends_are_given():
    """Where only the last frame is right, the tail is close and the head is not."""

    def blank_head(frames):
        return np.concatenate([np.zeros_like(frames[:1]), frames[1:]])

    psnr = {
        kind: evaluate.image_scores(artist(Draughtsman(blank_head)), PROMPTS[:2], kind)["given_frames_psnr"]
        for kind in ("i2v_head", "i2v_tail")
    }
    assert psnr["i2v_tail"] == math.inf
    assert psnr["i2v_head"] < 30


def test_reconstruction_is_compared():
    assert evaluate.autoencoder_scores(artist(Draughtsman()), PROMPTS[:2]) == {"prompts": 2, "psnr": math.inf}
    off_by_two = Draughtsman(lambda frames: (np.minimum(frames, 253) + 2).astype(np.uint8))
    assert evaluate.autoencoder_scores(artist(off_by_two), PROMPTS[:2])["psnr"] > 42


def test_the_table_has_goals_and_gaps():
    text = evaluate.table({"1:1": {"color": 98.5, "speed": None}, "16:9": {"color": 97.0}})
    assert [line.split() for line in text.splitlines()] == [
        ["goal", "1:1", "16:9"],
        ["color", "97", "98.5", "97"],
        ["speed", "0.9", "-", "-"],
    ]


def run(tmp_path, *more):
    small = {"num_frames": 5, "num_steps": 1, "resolution": "48px"}
    words = ["--prompts", "1", "--dtype", "fp32", "--aspect_ratios", "1:1", "--cond_types", "i2v_head"]
    return evaluate.main([*words, "--request", json.dumps(small), "--out", str(tmp_path / "scores.json"), *more])


def test_the_command_on_the_embedded_bundle(tmp_path, capsys):
    assert run(tmp_path) == 0
    figures = json.loads((tmp_path / "scores.json").read_text())
    assert set(figures) == {"t2v", "i2v", "vae", "how"}
    assert set(figures["t2v"]) == {"1:1"}
    assert set(figures["i2v"]) == {"i2v_head"}
    assert figures["how"]["request"]["num_frames"] == 5
    assert figures["how"]["request"]["seed"] == 42
    assert 0 < figures["vae"]["psnr"] < 99
    assert "given_frames_psnr" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--ckpt_path", "nowhere"], "no bundle at nowhere"),
        (["--request", '{"colour": 1}'], "colour"),
        (["--cond_types", "i2v_haed"], "i2v_head"),
        (["--dtype", "int4"], "unknown dtype"),
    ],
)
def test_mistakes_are_one_line(tmp_path, capsys, more, message):
    assert run(tmp_path, *more) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("osjax: error: ")
    assert message in error
    assert not list(tmp_path.iterdir())


def test_the_numbers_of_clips_are_positive(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run(tmp_path, "--prompts", "0")
    assert "above 0" in capsys.readouterr().err


def test_prompts_are_values():
    with pytest.raises(dataclasses.FrozenInstanceError):
        PROMPTS[0].caption = "another"
