"""The launch scripts, with programs in the place of `osjax` and `nvidia-smi` that print what they are given."""

import shutil
import subprocess
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[2] / "launch"
SHOWN = ("CUDA_VISIBLE_DEVICES", "XLA_PYTHON_CLIENT_MEM_FRACTION", "XLA_FLAGS", "NCCL_NVLS_ENABLE")


def program(path, body):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/bash\n{body}\n")
    path.chmod(0o755)


@pytest.fixture
def launch(tmp_path):
    """Run a script in a copy of the repository's layout; returns (status, words after osjax, environment)."""
    shutil.copytree(LAUNCH, tmp_path / "launch")
    shown = "".join(f'echo "{name}=${{{name}:-}}"; ' for name in SHOWN)
    program(tmp_path / ".venv" / "bin" / "osjax", f'echo "$#"; printf "%s\\n" "$@"; {shown}')

    def run(script, *words, gpus=0, **environment):
        program(tmp_path / ".venv" / "bin" / "nvidia-smi", f"for ((i = 0; i < {gpus}; i++)); do echo GPU $i; done")
        done = subprocess.run(
            [tmp_path / "launch" / script, *words],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
            env={"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), **environment},
        )
        count, *lines = done.stdout.splitlines() or ["0"]
        return done.returncode, lines[: int(count)], dict(line.split("=", 1) for line in lines[int(count) :])

    return run


def test_one_gpu_passes_everything_through(launch):
    status, words, environment = launch("one_gpu.sh", "256px", "--prompt", "raining, sea", "--seed=1")
    assert (status, words) == (0, ["generate", "256px", "--prompt", "raining, sea", "--seed=1"])
    assert environment["CUDA_VISIBLE_DEVICES"] == "0"
    assert environment["XLA_PYTHON_CLIENT_MEM_FRACTION"] == "0.95"


@pytest.mark.parametrize("gpus", [1, 8])
def test_one_host_shards_over_all_gpus(launch, gpus):
    status, words, _ = launch("one_host.sh", "768px", "--prompt", "a  b", gpus=gpus)
    assert (status, words) == (0, ["generate", "768px", "--mesh", f"data=1,seq={gpus}", "--prompt", "a  b"])


def test_one_host_keeps_to_the_gpus_it_is_given(launch):
    _, words, environment = launch("one_host.sh", "768px", gpus=8, CUDA_VISIBLE_DEVICES="4,5", XLA_FLAGS="--mine")
    assert words[2:] == ["--mesh", "data=1,seq=2"]
    assert environment["CUDA_VISIBLE_DEVICES"] == "4,5"
    assert environment["XLA_FLAGS"].split()[-1] == "--mine"


def test_multicast_is_left_alone(launch):
    assert launch("one_host.sh", "768px", gpus=2)[2]["NCCL_NVLS_ENABLE"] == ""
    assert launch("one_host.sh", "768px", gpus=2, NCCL_NVLS_ENABLE="0")[2]["NCCL_NVLS_ENABLE"] == "0"


def test_no_gpu_and_no_configuration_are_errors(launch):
    assert launch("one_host.sh", "768px", gpus=0)[0] == 2
    assert launch("one_gpu.sh")[0] != 0


def test_the_tiny_model_is_trained_in_four_stages_and_evaluated(tmp_path):
    """Each stage starts from what the one before leaves."""
    shutil.copytree(LAUNCH, tmp_path / "launch")
    for name in ("osjax", "python"):
        program(tmp_path / ".venv" / "bin" / name, f'echo {name} "$@"')
    command = [tmp_path / "launch" / "train_tiny.sh", "data=2"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={"PATH": "/usr/bin:/bin"})
    assert done.stdout.splitlines() == [
        "osjax train tiny_image --run.mesh data=2",
        "osjax train tiny_vae --ckpt_path runs/tiny_image/bundle --run.mesh data=2",
        "osjax train tiny_flow --ckpt_path runs/tiny_vae/bundle --run.mesh data=2",
        "osjax train tiny_pairs --ckpt_path runs/tiny_flow/bundle --run.mesh data=2",
        "python -m osjax.training.evaluate --ckpt_path runs/tiny_pairs/bundle --out runs/tiny_pairs/scores.json",
    ]
