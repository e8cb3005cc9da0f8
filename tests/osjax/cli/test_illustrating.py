"""`--use_t2i2v True`: pictures by FLUX first, then the videos that start from them, on golden checkpoints."""

import json

import numpy as np
import pytest
from PIL import Image

from osjax import provenance
from osjax.cli import generate, options
from osjax.cli.illustrating import Illustration, picture_of, picture_stem, started_from
from osjax.cli.main import main
from osjax.errors import OsjaxError
from osjax.pipeline import Pipeline
from osjax.request import Request
from tests import upstream_folder
from tests.osjax.refine.chat_server import KEY, said, serving
from tests.parity import cases

PARTS = ("mmdit_video", "hunyuan_vae", "text_t5", "text_clip")
FLUX = ("mmdit_flux", "autoencoder_2d")
SMALL = ["--height", "32", "--width", "48", "--num_frames", "9", "--num_steps", "3", "--dtype", "fp32"]
DRAWN = ["--use_t2i2v", "True", "--img_resolution", "64px"]


def convert(folder, *names):
    source = upstream_folder.write(folder / "ckpts", *(cases.load(name, cases.VENDORED) for name in names))
    assert main(["convert", str(source), str(folder / "bundle")]) == 0
    return folder / "bundle"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    return convert(tmp_path_factory.mktemp("with_flux"), *PARTS, *FLUX)


@pytest.fixture(scope="module")
def pipeline(bundle):
    return Pipeline.load(bundle, dtype="fp32", progress=False)


def make(bundle, out, *words):
    return main(["generate", "tiny", "--ckpt_path", str(bundle), "--save_dir", str(out), *SMALL, *DRAWN, *words])


def told(path):
    return json.loads(path.with_suffix(".json").read_text())


@pytest.fixture(scope="module")
def made(bundle, tmp_path_factory):
    """A folder with two videos from two pictures, drawn with offload."""
    out = tmp_path_factory.mktemp("made")
    assert make(bundle, out, "--prompt", "waves", "--num_sample", "2", "--offload", "True", "--seed", "7") == 0
    return out / "video_48x32"


def test_the_picture_is_kept_and_the_video_starts_from_it(made):
    pictures = made / "generated_condition"
    assert sorted(path.name for path in pictures.glob("*.png")) == ["prompt_0000.png", "prompt_0000_1.png"]
    for name, seed in (("prompt_0000", 7), ("prompt_0000_1", 8)):
        picture, video = told(pictures / f"{name}.png"), told(made / f"{name}.mp4")
        with Image.open(pictures / f"{name}.png") as image:
            assert (
                image.size == (picture["width"], picture["height"]) == (64, 64)
            )  # 3:2 of so few pixels, rounded down to 16
        assert (picture["seed"], picture["forward_passes"], picture["guidance"]["text"]) == (seed, 3, 4.0)
        assert picture["prompt_used"] == "waves"
        assert (video["cond_type"], video["prompt_used"]) == ("i2v_head", "waves. 24 FPS. 4 motion score.")
        assert video["refs"] == [{"name": f"{name}.png", "sha256": provenance.digest(pictures / f"{name}.png")}]


def test_without_offload_and_in_one_batch_it_is_the_same(bundle, made, tmp_path):
    """float32; the pictures are drawn at the same place among as many, so that they are the same to the bit."""
    assert make(bundle, tmp_path, "--prompt", "waves", "--num_sample", "2", "--seed", "7") == 0
    for name in ("generated_condition/prompt_0000", "prompt_0000_1"):
        ours = provenance.read(provenance.result_path(tmp_path / "video_48x32" / name, 1 if "/" in name else 9))
        theirs = provenance.read(provenance.result_path(made / name, 1 if "/" in name else 9))
        assert ours.frames_sha256 == theirs.frames_sha256


def test_what_is_made_is_kept_and_a_new_picture_makes_a_new_video(bundle, tmp_path, capsys):
    assert make(bundle, tmp_path, "--prompt", "waves") == 0
    video = tmp_path / "video_48x32" / "prompt_0000.mp4"
    picture = picture_stem(video.with_suffix("")).with_suffix(".png")
    before = video.stat().st_mtime_ns, picture.stat().st_mtime_ns
    capsys.readouterr()
    assert make(bundle, tmp_path, "--prompt", "waves") == 0
    assert (video.stat().st_mtime_ns, picture.stat().st_mtime_ns) == before
    assert capsys.readouterr().err.count("1 of 1 are made already") == 2
    assert make(bundle, tmp_path, "--prompt", "waves", "--img_guidance", "2") == 0
    assert video.stat().st_mtime_ns > before[0]
    assert told(picture)["guidance"]["text"] == 2.0


def test_prompts_are_refined_for_the_picture_and_then_with_it(bundle, tmp_path, monkeypatch):
    def answer(question):
        shown = not isinstance(question.content, str)
        return said("6" if question.is_score else "a picture and waves" if shown else "waves at length")

    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "*")
    with serving(answer) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        assert make(bundle, tmp_path, "--prompt", "waves", "--refine-prompt", "True", "--motion-score", "dynamic") == 0
        assert sorted(question.is_score for question in server.questions) == [False, False, True]
    video = tmp_path / "video_48x32" / "prompt_0000.mp4"
    assert told(picture_stem(video.with_suffix("")).with_suffix(".png"))["prompt_used"] == "waves at length"
    assert told(video)["prompt_used"] == "a picture and waves. 24 FPS. 6 motion score."


def test_repeating_the_video_takes_its_picture(bundle, made, tmp_path, capsys):
    words = ["generate", "--from", str(made / "prompt_0000.mp4"), "--ckpt_path", str(bundle)]
    assert main([*words, "--save_dir", str(tmp_path)]) == 0
    assert "same frames, bit for bit" in capsys.readouterr().err


def test_a_bundle_without_flux_says_where_it_comes_from(tmp_path, capsys):
    lacking = convert(tmp_path, *PARTS)
    assert make(lacking, tmp_path / "out", "--prompt", "waves") == 2
    assert "no image_mmdit and no image_vae" in (line := capsys.readouterr().err.splitlines()[-1])
    assert "osjax download flux1-dev" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"refs": ("a.png",), "cond_type": "i2v_head"}, "leave out --ref"),
        ({"cond_type": "i2v_tail"}, "leave out --ref and --cond_type"),
        ({"num_frames": 1}, "is for videos"),
    ],
)
def test_what_needs_no_picture(pipeline, changes, message):
    request = Request("waves", resolution=None, height=32, width=48, **({"num_frames": 9} | changes))
    with pytest.raises(OsjaxError, match=message):
        picture_of(request, Illustration("64px", 4.0), pipeline)


def test_a_resolution_that_is_none_is_told_before_anything_is_read():
    words = ["t2i2v_256px", "--prompt", "a", "--img_resolution", "large"]
    with pytest.raises(OsjaxError, match="unknown resolution 'large'"):
        generate.plan(options.read(words).config)


def test_pictures_and_videos_belong_together(tmp_path):
    stems = [picture_stem(tmp_path / name) for name in ("a", "b.c")]
    requests = [started_from(Request(prompt), stem) for prompt, stem in zip(("one", "two"), stems, strict=True)]
    assert [request.cond_type for request in requests] == ["i2v_head"] * 2
    assert [request.refs for request in requests] == [
        (str(tmp_path / "generated_condition" / name),) for name in ("a.png", "b.c.png")
    ]


def test_the_guidance_is_told_to_the_model(pipeline):
    """Another scale gives another picture, in as many passes; a LoRA would be the video's."""
    image = pipeline.of_images()
    request = Request("waves", resolution=None, height=32, width=32, num_frames=1, num_steps=2, guidance=4.0)
    first, second = (image(request if scale == 4.0 else _with(request, scale)) for scale in (4.0, 1.5))
    assert first.provenance.forward_passes == second.provenance.forward_passes == 2
    assert not np.array_equal(first.frames, second.frames)
    assert image.loras == ()


def _with(request, guidance):
    return Request(**{**request.recorded(), "refs": (), "guidance": guidance})
