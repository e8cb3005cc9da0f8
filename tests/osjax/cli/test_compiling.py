"""`osjax compile`: what a video compiles is there when it is drawn."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from osjax.cli import main
from osjax.media import write_png

SMALL = ["tiny", "--num_frames", "5", "--num_steps", "2", "--height", "32", "--width", "32", "--dtype", "fp32"]
MODELS = ("euler_step", "run_network", "encode_ids")  # what takes a moment to compile


def osjax(folder: Path, *words: str, cache: str = "cache") -> str:
    """What the command prints, in a process of its own that keeps whatever it compiles in `folder`/cache."""
    environment = dict(os.environ, JAX_COMPILATION_CACHE_DIR=str(folder / cache) if cache else "")
    environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0"}
    command = [sys.executable, "-m", "osjax.cli.main", *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout


def kept(folder: Path) -> set[str]:
    """The programs of models in the cache."""
    return {path.name for path in (folder / "cache").iterdir() if any(name in path.name for name in MODELS)}


@pytest.mark.parametrize(
    "options",
    [
        ["--speed", "balanced", "--offload", "True"],
        ["--cond_type", "i2v_head", "--mesh", "data=2,seq=2"],
    ],
    ids=["text", "picture"],
)
def test_nothing_of_the_models_is_left_to_compile(tmp_path, options):
    told = osjax(tmp_path, "compile", *SMALL, *options)
    compiled = kept(tmp_path)
    assert set(MODELS) <= {name.split("-")[0].removeprefix("jit_") for name in compiled}
    assert told.splitlines()[-1] == f"kept in {tmp_path / 'cache'}"
    parts = [line.split(":")[0] for line in told.splitlines()[:-1]]
    assert parts == ["text", *(["reference"] if "i2v_head" in options else []), "step", "decode"]
    if "i2v_head" in options:
        write_png(tmp_path / "picture.png", np.full((32, 32, 3), 99, np.uint8))
        options = [*options, "--ref", str(tmp_path / "picture.png")]
    osjax(tmp_path, "generate", *SMALL, *options, "--prompt", "a", "--save_dir", str(tmp_path / "samples"))
    assert kept(tmp_path) == compiled


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--num_frames", "6"], "num_frames is 6"),
        (["--extend", "1"], "compile is for one video by itself, not its continuation"),
        (["--ckpt_path", "none"], "no bundle at none"),
        (["--runs", "2"], "unknown option --runs"),
    ],
)
def test_refusals(capsys, words, message):
    assert main.main(["compile", "tiny", *words]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_without_a_place_to_keep_it(tmp_path):
    with pytest.raises(subprocess.CalledProcessError) as ended:
        osjax(tmp_path, "compile", *SMALL, cache="")
    assert ended.value.returncode == 2
    assert "set JAX_COMPILATION_CACHE_DIR" in ended.value.stderr
