"""Text encoders learn what captions say, on any mesh, and leave no readouts behind."""

import contextlib
import dataclasses

import jax
import numpy as np
import pytest

from osjax.bundle import read_bundle
from osjax.parallel.mesh import TrainingMeshShape, make_mesh
from osjax.training import loop
from osjax.training.facts import FACTS
from osjax.training.stages import open_stage
from tests.osjax.training import micro


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """The folder of a run over the same 16 captions again and again."""
    folder = tmp_path_factory.mktemp("text")
    config = micro.text(steps=120, save_every=120)
    loop.run(dataclasses.replace(config, optim=dataclasses.replace(config.optim, lr=2e-2)), folder)
    return folder


def test_loss_falls(learned):
    """It starts at that of a guess: both encoders, each fact by the logarithm of its answers."""
    losses = micro.losses(learned)
    assert losses[0] == pytest.approx(2 * sum(np.log(answers) for answers in FACTS.values()), rel=1e-3)
    assert np.mean(losses[-10:]) < 0.3 * losses[0]


def test_the_bundle_holds_encoders_that_the_next_stage_takes(learned, tmp_path):
    assert set(read_bundle(learned / "bundle").components) == {"t5", "clip"}
    new = {"mmdit": micro.MMDIT, "vae": micro.VAE}
    config = dataclasses.replace(micro.flow(), data=micro.DATA, new=new, ckpt_path=str(learned / "bundle"))
    stage, trained, _ = open_stage(config, make_mesh(TrainingMeshShape()), tmp_path)
    stage.stream.close()
    assert {name.split(".")[0] for name in trained} == {"mmdit", "t5", "clip"}


def test_sharded_equals_single(tmp_path):
    """The same losses but for the order of float32 sums: 1e-3 of them after four steps, as for the other stages."""
    for name, mesh in (("one", "data=1"), ("eight", "data=2,fsdp=2,tensor=2")):
        loop.run(micro.text(mesh=mesh), tmp_path / name)
    np.testing.assert_allclose(micro.losses(tmp_path / "eight"), micro.losses(tmp_path / "one"), rtol=1e-3)


def test_right_is_all_facts_of_a_caption(tmp_path):
    """Readouts that know one caption by its own answers: of two captions, half are right."""
    stage, trained, frozen = open_stage(micro.text(batch_size=2), make_mesh(TrainingMeshShape()), tmp_path)
    with contextlib.closing(stage.stream):
        batch = next(stage.stream)
    first, second = batch.facts_bf
    assert (first != second).any()
    for encoder in ("t5", "clip"):
        for fact, answer in zip(FACTS, first, strict=True):
            name = f"readout.{encoder}.{fact}.bias"
            trained[name] = trained[name].at[answer].set(10.0)
    _, reports = jax.jit(stage.loss)(trained, frozen, stage.prepare(frozen, batch), jax.random.key(0))
    assert reports == {"t5_right": 0.5, "clip_right": 0.5}
    assert list(stage.samples(trained, frozen, batch)) == []
