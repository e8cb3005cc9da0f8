"""All texts first: the same bits as encoded one group at a time, and each encoder brought to the devices once."""

import contextlib
import dataclasses

import jax
import numpy as np
import pytest

from osjax.cli import generate, options
from osjax.embedding import encode_all
from osjax.pipeline import Pipeline
from osjax.request import Request
from osjax.residency import Residency

SMALL = {"resolution": None, "height": 16, "width": 32, "num_frames": 5, "num_steps": 2}


def requests(*prompts, **options):
    return [Request(prompt, **(SMALL | options)) for prompt in prompts]


class Watched(Residency):
    """A residency that notes in `brought` whenever a model comes to the devices, from disk or from host memory."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.brought = []

    @contextlib.contextmanager
    def on_device(self, name, **how):
        leaves = jax.tree.leaves(self._modules.get(name))
        if not all(isinstance(leaf, jax.Array) for leaf in leaves) or not leaves:
            self.brought.append(name)
        with super().on_device(name, **how) as module:
            yield module


def watched(offload) -> Pipeline:
    pipeline = Pipeline.load(progress=False)
    residency = Watched(pipeline.bundle, pipeline.where.mesh, pipeline.residency.dtype, offload=offload)
    return dataclasses.replace(pipeline, residency=residency)


@pytest.fixture(scope="module")
def pipeline():
    return Pipeline.load(progress=False)


def test_what_was_encoded_before_is_drawn_to_the_bit(pipeline):
    groups = [requests("a cat", "a dog"), requests("a dog", "a cat", negative_prompt="blur"), requests("a cat")]
    for group, texts in zip(groups, encode_all(pipeline, groups), strict=True):
        before, by_itself = pipeline.run(group, texts), pipeline.run(group)
        for one, other in zip(before, by_itself, strict=True):
            np.testing.assert_array_equal(one.frames, other.frames)
        assert before[0].provenance.seconds["text"] == round(texts.seconds, 3)


def test_texts_wait_in_host_memory_and_equal_ones_once(pipeline):
    first, second, third = encode_all(pipeline, [requests("a cat"), requests("a dog"), requests("a cat", seed=1)])
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves((first[:2], second[:2])))
    assert first.prompt is third.prompt
    assert first.prompt is not second.prompt
    assert first.negative is second.negative


def test_a_bar_for_more_than_a_few(capfd):
    pipeline = Pipeline.load()
    encode_all(pipeline, [requests("a cat")])
    assert "texts" not in capfd.readouterr().err
    encode_all(pipeline, [requests(f"{number} cats") for number in range(10)])
    assert "texts: 100%" in capfd.readouterr().err


def test_nothing_to_encode_loads_nothing():
    pipeline = watched(offload=True)
    assert encode_all(pipeline, []) == []
    assert pipeline.residency.brought == []


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("extend", [0, 1])
def test_what_nothing_is_drawn_with_any_more_is_not_kept(tmp_path, last, extend):
    words = ["--prompt", "a cat", "--num_frames", "37", "--num_steps", "1", "--height", "16", "--width", "32"]
    words += ["--save_dir", str(tmp_path), "--extend", str(extend)]
    pipeline = watched(offload=True)
    generate.draw(generate.plan(options.read(words).config), pipeline, last=last)
    assert set(pipeline.residency._waiting) == ({"vae", "mmdit"} if extend else {"vae"}) | (
        set() if last else {"t5", "clip"}
    )


@pytest.mark.parametrize("offload", [True, False])
def test_a_csv_of_several_groups_brings_each_encoder_once(tmp_path, offload):
    (tmp_path / "rows.csv").write_text("text,num_frames\na cat,\na dog,1\nrain,\nsnow,\n")
    words = ["--num_frames", "5", "--num_steps", "2", "--height", "16", "--width", "32", "--batch_size", "2"]
    words += ["--dataset.data_path", str(tmp_path / "rows.csv"), "--save_dir", str(tmp_path)]
    plan = generate.plan(options.read(words).config)
    pipeline = watched(offload)
    generate.draw(plan, pipeline)
    drawn = ["mmdit", "vae"] * (3 if offload else 1)  # two groups of the video's size, and the image
    assert pipeline.residency.brought == ["t5", "clip", *drawn]
    assert len(list(tmp_path.rglob("*.mp4"))) == 3

    next(tmp_path.rglob("rows_0001.png")).unlink()
    pipeline.residency.brought.clear()
    generate.draw(plan, pipeline)
    assert pipeline.residency.brought == (["t5", "clip", "mmdit", "vae"] if offload else [])
