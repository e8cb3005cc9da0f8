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
    assert told.splitlines()[-1] == "videos: 3, forward passes in all: 12"
    assert not list(tmp_path.iterdir())


def test_kinds_are_told_in_the_order_of_the_table_each_by_its_fullest_group(tmp_path, capsys):
    table = tmp_path / "rows.csv"
    table.write_text("text,num_frames\na,5\nb,9\nc,5\nd,5\n")
    words = ["generate", *SMALL, "--dataset.data_path", str(table), "--batch_size", "2", "--dry-run", "True"]
    assert main.main(words) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if "pixels" in line]
    assert told == ["32 x 16 pixels, 5 frames, 2 at once", "32 x 16 pixels, 9 frames, 1 at once"]


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
        assert told.splitlines()[-1] == "pictures: 1, videos: 1, forward passes in all: 8"  # 2, and 2 of 3 branches
        assert "image_mmdit" in told
        weights[offload] = [float(line.split()[-3]) for line in told.splitlines() if line.strip().startswith("denoise")]
    assert weights["False"][1] > weights["True"][1] > 0
    assert not (tmp_path / "samples").exists()
