"""From a config to its stage: what goes together and what does not."""

import contextlib
import dataclasses
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from osjax.bundle import read_bundle, write_manifest
from osjax.errors import OsjaxError
from osjax.parallel.mesh import TrainingMeshShape, make_mesh
from osjax.training.batches import Drawn, Encoded
from osjax.training.flow_stage import FlowStage
from osjax.training.options import DataOptions, FlowOptions, LoRAOptions, TrainConfig
from osjax.training.stages import open_stage
from osjax.training.vae_stage import VAEStage
from tests.osjax.training import micro

FLOW = dataclasses.replace(micro.flow(), data=micro.DATA)  # shapes drawn anew, nothing encoded before


ONE = TrainingMeshShape()


def refusal(config, folder, mesh=ONE):
    with pytest.raises(OsjaxError) as caught:
        open_stage(config, make_mesh(mesh), folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def from_bundle(bundle, **changed):
    return dataclasses.replace(FLOW, ckpt_path=str(bundle), new={}, **changed)


def with_run(config, **run):
    return dataclasses.replace(config, run=dataclasses.replace(config.run, **run))


def test_flow(micro_bundle, tmp_path):
    stage, trained, frozen = open_stage(from_bundle(micro_bundle), make_mesh(ONE), tmp_path)
    with contextlib.closing(stage.stream):
        assert isinstance(stage, FlowStage)
        assert {name.split(".")[0] for name in trained} == {"mmdit", "t5", "clip"}
        assert {name.split(".")[0] for name in frozen} == {"vae"}
        assert {array.dtype for array in trained.values()} == {jnp.dtype(jnp.float32)}
        assert set(stage.tokenizers) == {"t5", "clip"}
        assert isinstance(next(stage.stream), Drawn)


def test_the_bundle_keeps_what_generation_is_to_be_asked_for(micro_bundle, tmp_path):
    """What the bundle of the start asked for, what this run adds, and what it changes."""
    start = tmp_path / "start"
    shutil.copytree(micro_bundle, start)
    held = read_bundle(start)
    write_manifest(start, held.components, held.sources, {"num_frames": 9, "num_steps": 20})
    config = from_bundle(start, settings={"num_frames": 5, "fps": 12})
    stage, trained, frozen = open_stage(config, make_mesh(ONE), tmp_path)
    with contextlib.closing(stage.stream):
        made = stage.export(tmp_path, trained, frozen, None)
    assert read_bundle(made).settings == {"num_frames": 5, "num_steps": 20, "fps": 12}


@pytest.mark.parametrize("settings", [{"frames": 5}, {"num_frames": 6}])
def test_settings_that_no_request_takes(micro_bundle, tmp_path, settings):
    assert next(iter(settings)) in refusal(from_bundle(micro_bundle, settings=settings), tmp_path)


def test_flow_on_clips_that_are_encoded_once(micro_bundle, tmp_path, capfd):
    config = from_bundle(micro_bundle, data=dataclasses.replace(micro.DATA, clips=16))
    stage, _, _ = open_stage(config, make_mesh(TrainingMeshShape(data=2)), tmp_path)
    with contextlib.closing(stage.stream):
        batch = next(stage.stream)
    assert isinstance(batch, Encoded)
    assert batch.z_bthwc.shape == (8, 2, 4, 4, 4)
    assert batch.z_bthwc.dtype == np.float16
    assert {end: each.shape[1] for end, each in batch.ends.items()} == {("head", 1): 1, ("tail", 1): 1}
    assert "encode clips" in capfd.readouterr().err


def test_an_adapter_alone_is_trained(micro_bundle, tmp_path):
    config = from_bundle(micro_bundle, trained=("mmdit",), lora=LoRAOptions(rank=2, alpha=8.0))
    stage, trained, frozen = open_stage(config, make_mesh(ONE), tmp_path)
    stage.stream.close()
    assert {name.split(".")[0] for name in trained} == {"lora"}
    assert {name.rsplit(".", 1)[1] for name in trained} == {"a", "b"}
    assert {name.split(".")[0] for name in frozen} == {"mmdit", "t5", "clip", "vae"}


def test_vae(tmp_path):
    stage, trained, frozen = open_stage(micro.vae(), make_mesh(ONE), tmp_path)
    stage.stream.close()
    assert isinstance(stage, VAEStage)
    assert {name.split(".")[0] for name in trained} == {"vae"}
    assert frozen == {}
    assert not list(tmp_path.iterdir())


def test_new_text_encoders_get_tokenizers_of_their_vocabulary_or_of_their_kind(micro_bundle, tmp_path):
    small = {name: value for name, value in micro.CLIP.items() if name != "vocab_size"}
    config = from_bundle(micro_bundle, trained=("mmdit",))
    config = dataclasses.replace(config, new={"t5": micro.T5, "clip": small})
    stage, _, frozen = open_stage(config, make_mesh(ONE), tmp_path)
    stage.stream.close()
    assert frozen["clip.token_embed.embedding"].shape == (49408, 16)
    for name, most in (("t5", 300), ("clip", 49408)):
        folder = tmp_path / "tokenizers" / name
        assert 256 < len(json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]) <= most
        assert stage.parts.components[name].tokenizer == str(folder)


@pytest.mark.parametrize("stage", ["", "Flow", "lora"])
def test_unknown_stages(stage):
    with pytest.raises(OsjaxError, match=f"unknown stage '{stage}': use flow, text or vae"):
        TrainConfig(stage)


@pytest.mark.parametrize(
    ("stage", "trained", "message"),
    [
        ("flow", (), "stage flow trains clip, mmdit, t5, not nothing: mend trained"),
        ("flow", ("mmdit", "vae"), "stage flow trains clip, mmdit, t5, not mmdit, vae"),
        ("flow", ("mmdti",), "not mmdti"),
        ("vae", ("mmdit",), "stage vae trains vae, not mmdit"),
        ("text", ("t5", "mmdit"), "stage text trains clip, t5, not t5, mmdit"),
    ],
)
def test_components_that_a_stage_cannot_train(tmp_path, stage, trained, message):
    assert message in refusal(dataclasses.replace(FLOW, stage=stage, trained=trained), tmp_path)


@pytest.mark.parametrize("trained", [("mmdit", "t5"), ("t5",), ()])
def test_an_adapter_is_trained_of_the_mmdit_alone(tmp_path, trained):
    config = dataclasses.replace(FLOW, trained=trained, lora=LoRAOptions(rank=2))
    assert "an adapter is trained of the mmdit, not of" in refusal(config, tmp_path)


@pytest.mark.parametrize("lora", [LoRAOptions(rank=-1), LoRAOptions(rank=2, targets=("qvk",))])
def test_adapters_that_cannot_be(tmp_path, lora):
    assert "lora." in refusal(dataclasses.replace(FLOW, trained=("mmdit",), lora=lora), tmp_path)


@pytest.mark.parametrize(
    ("stage", "left_out", "message"),
    [
        ("flow", {"vae"}, "stage flow needs a vae too: give ckpt_path or new"),
        ("flow", {"t5", "clip"}, "stage flow needs a t5 and a clip too"),
        ("vae", {"vae"}, "there is no vae to train"),
        ("text", {"t5"}, "stage text needs a t5 too: give ckpt_path or new"),
    ],
)
def test_parts_that_are_missing(tmp_path, stage, left_out, message):
    new = {name: each for name, each in FLOW.new.items() if name not in left_out}
    trained = {"flow": ("mmdit",), "vae": ("vae",), "text": ("clip",)}[stage]
    assert message in refusal(dataclasses.replace(FLOW, stage=stage, new=new, trained=trained), tmp_path)


def test_an_autoencoder_that_training_does_not_know(tmp_path):
    config = dataclasses.replace(micro.vae(), new={"vae": {"kind": "dc_ae"}})
    assert "stage vae cannot use a dc_ae" in refusal(config, tmp_path)


def test_captions_of_clips_have_no_facts_to_learn(tmp_path):
    data = dataclasses.replace(micro.DATA, path="clips.csv")
    assert "leave out data.path" in refusal(dataclasses.replace(micro.text(), data=data), tmp_path)


def test_a_text_encoder_without_its_length(tmp_path):
    new = FLOW.new | {"t5": {name: value for name, value in micro.T5.items() if name != "max_length"}}
    assert "new.t5 has a tokenizer but no max_length" in refusal(dataclasses.replace(FLOW, new=new), tmp_path)


@pytest.mark.parametrize(
    ("run", "mesh", "message"),
    [
        ({"batch_size": 6}, TrainingMeshShape(2, 2), "run.batch_size 6 does not divide over data x fsdp = 4 devices"),
        ({"dtype": "int8"}, ONE, "unknown dtype 'int8': use one of"),
        ({"attention": "flash"}, ONE, "unknown attention 'flash'"),
        ({"attention": "pallas"}, ONE, "attention pallas needs a Hopper GPU"),
        ({"attention": "cudnn"}, ONE, "attention cudnn needs an NVIDIA GPU"),
    ],
)
def test_runs_that_this_machine_cannot_do(tmp_path, run, mesh, message):
    assert message in refusal(with_run(FLOW, **run), tmp_path, mesh)


def test_conditions_that_draw_nothing(tmp_path):
    config = dataclasses.replace(FLOW, flow=FlowOptions(conditions={"t2v": 0.0}))
    assert "flow.conditions draws no kind" in refusal(config, tmp_path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (DataOptions(num_frames=()), "there are no buckets"),
        (DataOptions(num_frames=(0,)), "data.num_frames: 0 frames"),
        (DataOptions(resolution=("none",)), "none"),
        (DataOptions(path="none.csv"), "none.csv"),
        (DataOptions(cache="cache"), "data.cache keeps what is made of files"),
    ],
)
def test_data_that_cannot_be_used(tmp_path, data, message):
    assert message in refusal(dataclasses.replace(FLOW, trained=("mmdit",), data=data), tmp_path)


def test_the_autoencoder_in_training_is_not_cached(tmp_path):
    data = dataclasses.replace(micro.DATA, path="clips.csv", cache="cache")
    assert "data.cache cannot keep what vae makes" in refusal(dataclasses.replace(micro.vae(), data=data), tmp_path)
