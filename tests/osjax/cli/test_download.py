"""`osjax download` as a user runs it, against a hub on loopback: killed, out of disk, on to a bundle."""

import os
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from osjax.bundle import read_bundle
from tests import upstream_folder
from tests.osjax.hub.hub_server import Hub, serve
from tests.parity import cases

ROOT = Path(__file__).parents[3]
REPO = "someone/model"
WEIGHTS = np.random.default_rng(0).bytes(600_000)


@pytest.fixture
def hub():
    with serve(Hub({REPO: {"model.safetensors": WEIGHTS, "README.md": b"read me"}})) as hub:
        yield hub


def start(hub, folder, *words):
    """The command, running in `folder`, with the environment of a user who has no token."""
    quiet = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(folder / "home"), "PYTHONPATH": str(ROOT)}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")} | quiet
    words = [sys.executable, "-m", "osjax.cli.main", "download", *words]
    pipe = subprocess.PIPE
    return subprocess.Popen(words, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True)


def finish(process):
    out, errors = process.communicate(timeout=120)
    return process.returncode, out, errors


def test_the_line_of_space_the_progress_and_what_is_next(hub, tmp_path):
    status, out, errors = finish(start(hub, tmp_path, REPO))
    assert status == 0, errors
    assert re.match(r"600kB needed, [\d.]+.B free in ckpts\n", out)
    assert out.endswith("next: osjax convert ckpts bundles/model\n")
    assert re.search(r"model.safetensors: +\d+%.* 600k/600k \[\d\d:\d\d<\d\d:\d\d, .*B/s\]", errors)
    assert (tmp_path / "ckpts" / "model.safetensors").read_bytes() == WEIGHTS


def test_a_dry_run_lists_and_writes_nothing(hub, tmp_path):
    status, out, errors = finish(start(hub, tmp_path, REPO, "--dry-run", "--to", "elsewhere"))
    assert (status, errors) == (0, "")
    assert re.fullmatch(r" +600kB  model.safetensors\n600kB needed, [\d.]+.B free in elsewhere\n", out)
    assert not list(tmp_path.iterdir())


def test_a_killed_download_goes_on(hub, tmp_path):
    hub.breaks["model.safetensors"] = [250_000, 0, 0]  # the command waits, with a part on the disk
    process = start(hub, tmp_path, REPO)
    while not (parts := list((tmp_path / "ckpts").glob("*.part"))) or parts[0].stat().st_size < 250_000:
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.kill()
    assert finish(process)[0] == -signal.SIGKILL
    hub.breaks.clear()
    status, out, errors = finish(start(hub, tmp_path, REPO))
    assert status == 0, errors
    assert out.startswith("350kB needed, ")
    assert hub.sent("model.safetensors")[-1] == "bytes=250000-"
    assert [path.name for path in (tmp_path / "ckpts").iterdir()] == ["model.safetensors"]
    assert (tmp_path / "ckpts" / "model.safetensors").read_bytes() == WEIGHTS


def test_a_disk_that_fills_on_the_way_is_one_line_and_the_same_command_goes_on(hub, tmp_path):
    """The system's limit on the size of a file stands for the disk."""
    few = (100_000, 100_000)
    process = start(hub, tmp_path, REPO)
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, few)  # long before it has asked the hub
    status, _, errors = finish(process)
    assert status == 2
    last = errors.splitlines()[-1]
    assert last.startswith("osjax: error: cannot write ckpts/model.safetensors.")
    assert "the same command goes on" in last
    assert finish(start(hub, tmp_path, REPO))[0] == 0
    assert hub.sent("model.safetensors")[-1] == "bytes=100000-"


def test_on_to_a_bundle(hub, tmp_path):
    names = ("mmdit_video", "hunyuan_vae", "text_t5", "text_clip")
    published = upstream_folder.write(tmp_path / "published", *(cases.load(name, cases.VENDORED) for name in names))
    hub.repos["someone/tiny-sora"] = {
        path.relative_to(published).as_posix(): path.read_bytes() for path in published.rglob("*") if path.is_file()
    }
    status, out, errors = finish(start(hub, tmp_path, "someone/tiny-sora", "--convert"))
    assert status == 0, errors
    assert "bundle written to bundles/tiny_sora" in out
    assert set(read_bundle(tmp_path / "bundles" / "tiny_sora").components) == {"mmdit", "vae", "t5", "clip"}


def test_a_bundle_that_is_there_is_noticed_first(hub, tmp_path):
    (tmp_path / "bundles" / "model").mkdir(parents=True)
    status, out, errors = finish(start(hub, tmp_path, REPO, "--convert"))
    assert (status, out) == (2, "")
    assert errors == "osjax: error: bundles/model exists: remove it, or leave out --convert\n"
    assert not hub.seen
