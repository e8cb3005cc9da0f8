"""Whole runs of a micro model on 8 CPU devices: they learn, resume exactly, and do not depend on the mesh."""

import contextlib
import dataclasses
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from osjax import adapters
from osjax.bundle import read_bundle
from osjax.errors import OsjaxError
from osjax.models.projections import projections
from osjax.parallel.mesh import TrainingMeshShape, make_mesh
from osjax.training import loop
from osjax.training.options import LoRAOptions, TrainConfig
from osjax.training.parts import load_weights, open_parts
from osjax.training.snapshots import Snapshots
from tests.osjax.training import micro

ROOT = Path(__file__).parents[3]


def with_run(config: TrainConfig, **run: object) -> TrainConfig:
    return dataclasses.replace(config, run=dataclasses.replace(config.run, **run))


def exported(folder: Path) -> dict[str, np.ndarray]:
    """Every array of a bundle, by component and leaf."""
    parts = open_parts(str(folder), {}, (), jnp.bfloat16)
    _, weights = load_weights(parts, make_mesh(TrainingMeshShape()), jax.random.key(0))
    return {name: np.asarray(array) for name, array in weights.items()}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A run of 8 steps that nothing interrupted, saved at every second one."""
    folder = tmp_path_factory.mktemp("whole")
    ended = loop.run(micro.flow(steps=8), folder)
    assert ended == loop.Ended(8, folder / "bundle")
    return folder


def test_loss_falls(tmp_path):
    loop.run(micro.vae(steps=24, save_every=24), tmp_path)
    losses = micro.losses(tmp_path)
    assert len(losses) == 24
    assert np.mean(losses[-4:]) < 0.7 * np.mean(losses[:4])


def test_bundle_of_a_run_is_whole(whole):
    bundle = read_bundle(whole / "bundle")
    assert set(bundle.components) == {"mmdit", "t5", "clip", "vae"}
    assert bundle.component("mmdit").dtype == "bfloat16"
    assert all(np.isfinite(array.astype(np.float32)).all() for array in exported(whole / "bundle").values())


def test_killed_and_resumed_is_bit_equal(whole, tmp_path):
    """kill -9 between two checkpoints; the rest of the run repeats what was lost."""
    code = (
        "import os, sys; sys.path.insert(0, sys.argv[2])\n"
        "from pathlib import Path\n"
        "from tests.osjax.training import micro\n"
        "from osjax.training import loop\n"
        "loop.run(micro.flow(steps=8), Path(sys.argv[1]))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path), str(ROOT)]
    process = subprocess.Popen(command, cwd=ROOT)
    metrics = tmp_path / "metrics.jsonl"
    deadline = time.monotonic() + 240
    while not (metrics.exists() and len(metrics.read_text().splitlines()) >= 3):
        assert process.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    process.wait()
    assert not (tmp_path / "bundle").exists()
    loop.run(micro.flow(steps=8), tmp_path)
    ours, theirs = exported(tmp_path / "bundle"), exported(whole / "bundle")
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)
    assert micro.losses(tmp_path) == micro.losses(whole)


def test_sharded_equals_single(whole, tmp_path):
    """Weights over fsdp and tensor, batches over data and fsdp: the same losses but for the order of float32 sums.

    Adam divides by the root of tiny second moments, so that rounding grows: 1e-3 of the loss after eight steps.
    """
    loop.run(micro.flow(steps=8, mesh="data=2,fsdp=2,tensor=2"), tmp_path)
    np.testing.assert_allclose(micro.losses(tmp_path), micro.losses(whole), rtol=1e-3)


def test_sigterm_saves_and_stops(whole, tmp_path):
    config = micro.flow(steps=8, save_every=100)

    class Stopping(loop.Metrics):
        def log(self, step, values):
            super().log(step, values)
            if step == 3:
                os.kill(os.getpid(), signal.SIGTERM)

    original, loop.Metrics = loop.Metrics, Stopping
    try:
        ended = loop.run(config, tmp_path)
    finally:
        loop.Metrics = original
    assert ended.exported is None
    assert 3 <= ended.steps < 8
    assert loop.run(config, tmp_path).steps == 8
    assert micro.losses(tmp_path) == micro.losses(whole)


def test_finished_run_exports_again(whole):
    before = exported(whole / "bundle")
    ended = loop.run(micro.flow(steps=8), whole)
    assert ended == loop.Ended(8, whole / "bundle")
    assert all(np.array_equal(array, before[name]) for name, array in exported(ended.exported).items())


def test_other_config_is_refused(whole):
    config = micro.flow(steps=8)
    other = dataclasses.replace(config, optim=dataclasses.replace(config.optim, lr=1.0))
    with pytest.raises(OsjaxError, match=r"optim\.lr.*0\.003.*1\.0"):
        loop.run(other, whole)


def test_nan_stops_and_names_the_step(tmp_path):
    config = micro.flow(steps=8, save_every=1)
    # Weights of this size are finite, the squares of what they predict are not.
    broken = dataclasses.replace(config, optim=dataclasses.replace(config.optim, lr=1e19))
    with pytest.raises(OsjaxError, match=r"loss.* of step \d+ not finite") as raised:
        loop.run(broken, tmp_path)
    bad = int(re.search(r"step (\d+)", str(raised.value))[1])
    assert 2 <= bad <= 8
    with contextlib.closing(Snapshots(tmp_path, 3, dataclasses.asdict(broken))) as snapshots:
        assert snapshots.latest() == bad - 1
    assert not (tmp_path / "bundle").exists()
    with pytest.raises(OsjaxError, match=f"of step {bad} not finite"):  # the same again, from the last good one
        loop.run(broken, tmp_path)


def test_batch_that_does_not_divide(tmp_path):
    with pytest.raises(OsjaxError, match=r"batch_size 6 does not divide over data x fsdp = 4 devices: use .* 8"):
        loop.run(micro.flow(batch_size=6, mesh="data=2,fsdp=2"), tmp_path)


def test_adapter_trains_alone_and_merges(whole, tmp_path):
    config = dataclasses.replace(
        micro.flow(steps=3),
        ckpt_path=str(whole / "bundle"),
        new={},
        trained=("mmdit",),
        lora=LoRAOptions(rank=2, alpha=4.0),
    )
    ended = loop.run(config, tmp_path)
    assert ended.exported == tmp_path / "lora"
    trained = adapters.load(adapters.read(ended.exported))
    assert any(np.asarray(factors.b).any() for factors in trained.factors.values())
    parts = open_parts(str(whole / "bundle"), {}, (), jnp.float32)
    assert set(trained.factors) <= set(projections(parts.modules["mmdit"]))
