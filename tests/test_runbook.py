"""The README's table of upstream's commands: every one of ours runs, on tiny checkpoints and at tiny sizes."""

import contextlib
import csv
import os
import re
import shlex
import shutil
import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from osjax.cli import main as cli
from osjax.media import write_mp4
from tests import upstream_folder
from tests.osjax.hub.hub_server import Hub, serve
from tests.osjax.hub.test_modelscope import ModelScopeHandler
from tests.osjax.refine.chat_server import KEY, said, serving
from tests.parity import cases

ROOT = Path(__file__).parents[1]
PARTS = ("mmdit_video", "hunyuan_vae", "text_t5", "text_clip", "mmdit_flux", "autoencoder_2d")
TEXT = ("text_t5", "text_clip")
# Behind a command's own words, so that these count.
SMALL = {
    "generate": "--num_steps 2 --dtype fp32 --img_resolution 64px",
    "train": "--run.steps 1 --run.batch_size 8 --run.dtype fp32 --data.resolution 32px --data.num_frames 5"
    " --data.aspect_ratios 1:1",
}
SIZES = {"high_compression": "--resolution 128px --num_frames 8", None: "--resolution 64px --num_frames 9"}


def commands():
    """Ours, from the rows of the table in which upstream's stand first."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## From Open-Sora's runbook")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (.+) \| `(osjax [^`]+)` \|$", section, re.MULTILINE)
    assert len(rows) == section.count("\n| ") - 1, "a row that is no command"
    return [ours for _, ours in rows]


def narrowed(case, channels):
    """A golden MMDiT of patch 1 with the first latent channels only: the golden autoencoder has few."""
    ends = {
        "img_in.weight": np.s_[:, :channels],
        "cond_in.weight": np.s_[:, : channels + 1],
        "final_layer.linear.weight": np.s_[:channels],
        "final_layer.linear.bias": np.s_[:channels],
    }
    weights = {name: tensor[ends.get(name, ...)] for name, tensor in case.weights.items()}
    return types.SimpleNamespace(weights=weights, config=case.config | {"in_channels": channels})


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A working folder with everything that the commands name: checkpoints, bundles, tables, pictures, clips."""
    folder = tmp_path_factory.mktemp("runbook")
    golden = {name: cases.load(name, cases.VENDORED) for name in (*PARTS, "dc_ae", "mmdit_dcae")}
    upstream_folder.write(folder / "ckpts", *(golden[name] for name in PARTS))
    compressed = (golden["dc_ae"], narrowed(golden["mmdit_dcae"], golden["dc_ae"].config["latent_channels"]))
    texts = (golden[name] for name in TEXT)
    upstream_folder.write(folder / "compressed", *compressed, *texts, model="high_compression")
    convert = ["convert", str(folder / "ckpts"), str(folder / "bundles" / "open_sora_v2")]
    assert cli.main(convert) == 0
    convert = ["convert", str(folder / "compressed"), str(folder / "bundles" / "high_compression")]
    assert cli.main([*convert, "--model", "high_compression"]) == 0
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (48, 80, 3), np.uint8)).save(folder / "pig.png")
    for name, header, row in (("texts", ["text"], ["rain"]), ("i2v", ["text", "ref"], ["a pig", "pig.png"])):
        with (folder / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([header, row, row])
    with (folder / "clips.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["path", "text"], *([f"{i}.mp4", "waves"] for i in range(8))])
    for i in range(8):
        write_mp4(folder / f"{i}.mp4", rng.integers(0, 255, (9, 32, 32, 3), np.uint8), 24)
    return folder


def small(words):
    """A command's words at tiny sizes, and with the bundle's name put in."""
    words = [word.replace("$B", "bundles/open_sora_v2") for word in words]
    more = SMALL[words[0]].split()
    if words[0] == "generate":
        more += SIZES.get(words[1], SIZES[None]).split()
    if "--aspect_ratio" in words:  # a ratio counts
        assert "--num_frames" in words
    return words + more


@pytest.mark.parametrize("command", [each for each in commands() if each.split()[1] in SMALL])
def test_it_runs(command, place, monkeypatch, request):
    monkeypatch.chdir(place)
    _, *words = shlex.split(command)
    out = place / f"out_{len(list(place.glob('out_*')))}"
    words = small(words) + (["--save_dir", str(out)] if words[0] == "generate" else ["--out", str(out)])
    with _language_model(monkeypatch) if {"--refine-prompt", "dynamic"} & set(words) else contextlib.nullcontext():
        assert cli.main(words) == 0
    made = sorted(path.name for path in out.rglob("*.mp4"))
    table = any(word.endswith(".csv") for word in words)
    assert len(made) == (0 if words[0] == "train" else 2 if table or "--num-sample" in words else 1)
    if words[0] == "train":
        assert (out / "bundle" / "bundle.json").is_file()
    if words[1].startswith("t2i2v"):
        assert len(list(out.rglob("generated_condition/*.png"))) == len(made)


@contextlib.contextmanager
def _language_model(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "*")
    with serving(lambda question: said("6" if question.is_score else "rain at length")) as server:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        yield


def test_downloads_and_the_conversion_of_what_came(place, tmp_path):
    """Each in a process of its own, for hubs on loopback that hold the repository."""
    files = {path.relative_to(place / "ckpts").as_posix(): path.read_bytes() for path in (place / "ckpts").rglob("*.*")}
    repos = {"hpcai-tech/Open-Sora-v2": files}
    downloads = [each for each in commands() if each.startswith("osjax download")]
    with serve(Hub(dict(repos))) as hub, serve(Hub(dict(repos)), ModelScopeHandler) as scope:
        hubs = {"HF_ENDPOINT": hub.endpoint, "MODELSCOPE_ENDPOINT": scope.endpoint, "HF_HOME": str(tmp_path / "home")}
        for command in downloads:
            folder = tmp_path / ("scope" if "modelscope" in command else "hub")
            folder.mkdir(exist_ok=True)
            _run(command, folder, hubs | {"MODELSCOPE_CACHE": str(tmp_path / "cache")})
    assert len(downloads) == 3
    (convert,) = (each for each in commands() if each.startswith("osjax convert"))
    for folder in (tmp_path / "hub", tmp_path / "scope"):
        for options in (place / "ckpts").glob("*.json"):  # of sizes that are not the published ones
            shutil.copy(options, folder / "ckpts")
        _run(convert.replace("$B", "bundles/open_sora_v2"), folder, {})
        assert (folder / "bundles" / "open_sora_v2" / "bundle.json").is_file()


def _run(command, folder, environment):
    _, *words = shlex.split(command)
    run = [sys.executable, "-m", "osjax.cli.main", *words]
    ours = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    environment = ours | {"PYTHONPATH": str(ROOT), "NO_PROXY": "*"} | environment
    done = subprocess.run(run, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
