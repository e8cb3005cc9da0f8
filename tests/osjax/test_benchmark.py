"""Parts that are measured are those that a video needs, each as often."""

import dataclasses

import jax.numpy as jnp
import pytest

from osjax import benchmark, random_weights
from osjax.errors import OsjaxError
from osjax.parallel.mesh import make_mesh, parse_mesh
from osjax.pipeline import Pipeline
from osjax.request import Request
from tests.small_models import SMALL

REQUEST = Request("-", resolution=None, height=32, width=32, num_frames=5, num_steps=12)


def pipeline(mesh="data=1,seq=1", *, offload=False, offload_blocks=None):
    devices = make_mesh(parse_mesh(mesh))
    residency = random_weights.residency(random_weights.bundle_of(SMALL), devices, jnp.float32, offload=offload)
    how = {"progress": False, "offload_blocks": offload_blocks}
    return Pipeline.over(residency, devices, "fp32", "auto", "random weights", **how)


@pytest.mark.parametrize(
    ("options", "times"),
    [
        ({}, {"text": 2, "step of 1": 1, "step of 2": 11, "decode": 1}),
        ({"cond_type": "i2v_loop"}, {"text": 2, "reference": 2, "step of 1": 1, "step of 3": 11, "decode": 1}),
        ({"num_frames": 1, "text_osci": False}, {"text": 2, "step of 2": 12, "decode": 1}),
    ],
)
def test_parts_and_passes_are_those_of_the_estimate(options, times):
    drawer = pipeline()
    refs = ("-",) * {"i2v_loop": 2}.get(options.get("cond_type"), 0)
    request = dataclasses.replace(REQUEST, refs=refs, **options)
    measured = benchmark.measure(drawer, [request], 1, progress=False)
    assert {part.name: part.times for part in measured.parts} == times
    assert measured.passes == drawer.estimate([request]).passes
    assert measured.passes == sum(int(name[-1]) * times[name] for name in times if name.startswith("step"))
    assert all(part.seconds > 0 and part.first >= 0 and part.runs == 1 for part in measured.parts)
    assert measured.seconds == pytest.approx(sum(part.seconds * part.times for part in measured.parts))
    assert [load.name for load in measured.loads] == ["t5", "clip", "vae", "mmdit"]
    weights = {name: component.parameters * 4e-9 for name, component in drawer.bundle.components.items()}
    assert {load.name: load.gigabytes for load in measured.loads} == pytest.approx(weights)


def test_several_at_once_over_a_mesh_with_models_that_wait():
    request = dataclasses.replace(REQUEST, cond_type="i2v_head", refs=("-",))
    measured = benchmark.measure(pipeline("data=2,seq=2", offload=True), [request] * 2, 1, progress=False)
    times = {part.name: part.times for part in measured.parts}
    assert times["reference"] == 2
    assert times["transformer comes"] == 1, "once a video, not at each step"
    assert times["text encoders come"] == 1, "for the prompts and what they are not to be"
    assert measured.videos == 2


def test_a_transformer_that_comes_block_by_block():
    drawer = pipeline(offload=True, offload_blocks=True)
    measured = benchmark.measure(drawer, [REQUEST], 1, progress=False)
    assert {"step of 1", "step of 2", "transformer comes"} <= {part.name for part in measured.parts}
    (load,) = [each for each in measured.loads if each.name == "mmdit"]
    assert load.gigabytes == pytest.approx(drawer.bundle.components["mmdit"].parameters * 4e-9)
    assert "" not in benchmark.compile_all(drawer, [REQUEST], progress=False)


def test_what_cannot_be_drawn_is_told_first():
    with pytest.raises(OsjaxError, match="num_frames is 6"):
        benchmark.measure(pipeline(), [dataclasses.replace(REQUEST, num_frames=6)], 1)
