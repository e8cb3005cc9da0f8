"""`osjax generate --dry-run True`: what it tells, and that nothing else happens."""

import pytest

from osjax import room
from osjax.cli import main
from osjax.cli.dry_run import tell
from osjax.errors import OsjaxError
from osjax.pipeline import Pipeline
from osjax.request import Request
from tests import upstream_folder
from tests.parity import cases

SMALL = ["--num_frames", "5", "--num_steps", "2", "--height", "16", "--width", "32"]


def test_it_tells_and_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["generate", *SMALL, "--prompt", "a", "--num_sample", "3", "--batch_size", "2", "--dry-run", "True"]
    assert main.main(words) == 0
    told = capsys.readouterr().out
    assert told.count("32 x 16 pixels, 5 frames, 2 at once") == 1
    assert told.count("pixels") == 1, "one of each kind"
    assert "what the device has is not known" in told
    assert told.splitlines()[-1] == "3 videos, 12 forward passes in all"
    assert not list(tmp_path.iterdir())


def test_a_mistake_is_told_as_ever(capsys):
    assert main.main(["generate", *SMALL, "--prompt", "a", "--cond_type", "i2v_head", "--dry-run", "True"]) == 2
    assert "takes 1 reference" in capsys.readouterr().err


def test_what_does_not_fit_is_an_error_that_says_what_would_help(capsys, monkeypatch):
    monkeypatch.setattr(room, "memory", lambda device: room.Memory(0.2, 0.2))  # a CPU does not tell what it has
    pipeline = Pipeline.load(dtype="fp32", progress=False)
    request = Request("a", resolution="96px", aspect_ratio="1:1", num_frames=33)
    with pytest.raises(OsjaxError, match=r"decode .* of 0\.2 GB: .*--num_frames"):
        tell([([[request]], pipeline)])
    assert "it does not fit" in capsys.readouterr().out
    assert not pipeline.residency._modules


def test_pictures_and_the_videos_that_start_from_them(tmp_path, capsys):
    """Without offloading FLUX stays beside the video's model."""
    names = ("mmdit_video", "hunyuan_vae", "text_t5", "text_clip", "mmdit_flux", "autoencoder_2d")
    source = upstream_folder.write(tmp_path / "ckpts", *(cases.load(name, cases.VENDORED) for name in names))
    assert main.main(["convert", str(source), str(tmp_path / "bundle")]) == 0
    words = ["generate", "tiny", *SMALL, "--ckpt_path", str(tmp_path / "bundle"), "--prompt", "a", "--dry-run", "True"]
    capsys.readouterr()
    weights = {}
    for offload in ("True", "False"):
        assert main.main([*words, "--use_t2i2v", "True", "--img_resolution", "64px", "--offload", offload]) == 0
        told = capsys.readouterr().out
        assert told.splitlines()[-1] == "1 pictures, 1 videos, 8 forward passes in all"  # 2, and 2 of 3 branches
        assert "image_mmdit" in told
        weights[offload] = [float(line.split()[-3]) for line in told.splitlines() if line.strip().startswith("denoise")]
    assert weights["False"][1] > weights["True"][1] > 0
    assert not (tmp_path / "samples").exists()
