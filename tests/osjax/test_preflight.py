"""What a request is said to take: the published sizes, by their manifest alone, and the embedded bundle."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import pytest

from osjax.bundle import Bundle, Component
from osjax.errors import OsjaxError
from osjax.parallel.mesh import MeshShape
from osjax.pipeline import Pipeline
from osjax.preflight import REFERENCES, Setting, estimate
from osjax.request import Request

COUNTS = {"mmdit": 11_891_390_528, "hunyuan_vae": 246_478_803, "t5": 4_762_310_656, "clip": 123_060_480}


def component(kind, max_length=None):
    return Component(kind, {}, "bfloat16", COUNTS[kind], 2 * COUNTS[kind], kind, None, max_length)


PUBLISHED = Bundle(
    path=Path("published"),
    digest="",
    components={
        "mmdit": component("mmdit"),
        "vae": component("hunyuan_vae"),
        "t5": component("t5", 512),
        "clip": component("clip", 77),
    },
    sources={},
    settings={},
    osjax="",
)


def setting(count=1, mesh=None, offload=True, attention="cudnn", **options) -> Setting:
    return Setting((Request("a", **options),) * count, mesh or MeshShape(), jnp.bfloat16, offload, attention)


def found(**options):
    return estimate(PUBLISHED, setting(**options))


def test_blocks_of_8_bits_weigh_two_thirds():
    """8.65 of 11.9 billion weights are in blocks' projections, all but the modulation's; 15.2 GB was counted by hand of
    their shapes, with a float32 for each output. The model is never there in bf16."""
    small = estimate(PUBLISHED, dataclasses.replace(setting(), precision="int8"))
    assert small.weights["mmdit"] == pytest.approx(15.18, abs=0.01)
    assert {name: small.weights[name] for name in ("t5", "clip", "vae")} == {
        name: found().weights[name] for name in ("t5", "clip", "vae")
    }
    stages = {each.name: each for each in small.stages}
    assert stages["denoise"].weights == small.weights["mmdit"]
    assert [each.name for each in small.stages] == [each.name for each in found().stages]
    assert small.peak.name == "denoise"


def stage(name, **options):
    return next(each for each in found(**options).stages if each.name.startswith(name))


@pytest.mark.parametrize(
    ("name", "resolution", "measured"),
    [("denoise", "256px", 24.6), ("denoise", "768px", 29.2), ("decode", "256px", 8.7)],
)
def test_it_is_a_little_above_what_was_measured(name, resolution, measured):
    """On one H100, docs/performance.md; of decoding, what the compiler planned for a tile there, and its weights."""
    assert measured <= stage(name, resolution=resolution).total <= 1.1 * measured


def test_sizes_and_passes():
    told = found(resolution="768px")
    assert (told.size, told.frames, told.grid.tokens, told.text_tokens) == ((576, 1024), 129, 76032, 512)
    assert told.passes == told.in_full == 80
    assert found(cond_type="i2v_head", refs=("a.png",)).passes == 110
    assert found(cond_type="i2v_head", refs=("a.png",), num_frames=1).passes == 80, "one frame takes no reference"
    assert found(guidance=1.0, guidance_img=1.0).passes == 50
    fast = found(speed="fast")
    assert (fast.passes, fast.in_full) == (80, 18)
    assert told.parameters["mmdit"] == COUNTS["mmdit"]
    assert told.weights["mmdit"] == pytest.approx(23.78, abs=0.01)


def test_without_offload_what_was_used_stays():
    stays = [round(each.weights, 1) for each in found(offload=False).stages]
    goes = [round(each.weights, 1) for each in found(offload=True).stages]
    assert stays == [9.5, 9.8, 33.6, 34.0]
    assert goes == [9.5, 0.2, 23.8, 0.5]


def test_in_blocks_a_few_of_them_are_there():
    whole, parts = (
        {each.name: each for each in estimate(PUBLISHED, dataclasses.replace(setting(**what), in_blocks=way)).stages}
        for what in [{"resolution": "768px"}]
        for way in (False, True)
    )
    block, around = 36 * 3072**2, COUNTS["mmdit"] - (19 * 36 + 38 * 15) * 3072**2
    assert parts["denoise"].weights == pytest.approx((3 * block + around) * 2 / 1e9, rel=0.05)
    # Three branches wait, and one is at work; without blocks there is one at a time.
    assert 0.9 <= parts["denoise"].activations / whole["denoise"].activations <= 1.5
    assert [each for each in whole if parts[each] != whole[each]] == ["denoise"]


@pytest.mark.parametrize("speed", ["exact", "fast"])
def test_in_blocks_it_is_less_on_several_devices(speed):
    def rest(**shape):
        asked = setting(resolution="768px", speed=speed, mesh=MeshShape(**shape))
        stages = estimate(PUBLISHED, dataclasses.replace(asked, in_blocks=True)).stages
        return next(each.activations for each in stages if each.name == "denoise")

    assert rest(seq=8) < rest(seq=2) < 0.7 * rest()


def test_an_approximation_keeps_what_blocks_added():
    """Two arrays of 3072 features for each of three branches, in bf16; loops may hand them on as copies."""
    exact, fast = (stage("denoise", resolution="256px", speed=speed).activations for speed in ("exact", "fast"))
    kept = 3 * 2 * 8316 * 3072 * 2 / 1e9
    assert kept <= fast - exact <= 3 * kept


@pytest.mark.parametrize(
    ("kind", "resolution", "during", "allowed"),
    [
        ("i2v_head", "256px", REFERENCES, True),
        ("v2v_head", "256px", REFERENCES, False),
        ("v2v_head", "768px", REFERENCES, True),
        ("i2v_head", "768px", "text (T5)", False),
    ],
)
def test_the_transformer_may_come_early_where_that_takes_no_more(kind, resolution, during, allowed):
    told = found(cond_type=kind, refs=("a",), resolution=resolution)
    assert told.allows_transformer(during=during) == allowed


def test_references_are_a_stage_where_there_are_some():
    names = [each.name for each in found(cond_type="v2v_head", refs=("a.mp4",)).stages]
    assert names == ["text (T5)", "text (CLIP)", "references (VAE encode)", "denoise", "decode (VAE)"]
    assert stage("references", cond_type="v2v_head", refs=("a.mp4",)).activations > 1


def test_what_makes_it_more_and_less():
    one = stage("denoise").activations
    assert 1.3 * one < stage("denoise", count=2).activations < 2 * one
    assert stage("denoise", count=2, mesh=MeshShape(data=2)).activations == pytest.approx(one, rel=0.05)
    assert stage("denoise", resolution="768px", mesh=MeshShape(seq=4)).activations < 0.4 * 6.8
    assert stage("denoise", attention="xla").activations > one
    assert stage("denoise", num_frames=33).activations < one
    assert found(mesh=MeshShape(seq=7)).peak.name == "denoise", "tokens and heads need not divide"


def test_blocks_that_are_compiled_one_by_one_take_about_as_much():
    whole, by_block = (dataclasses.replace(setting(), in_parts=in_parts) for in_parts in (False, True))
    told, other = (estimate(PUBLISHED, each) for each in (whole, by_block))
    assert told.weights == other.weights
    assert other.peak.total == pytest.approx(told.peak.total, rel=0.05)


def test_the_peak_and_whether_it_fits():
    told = found()
    assert told.peak.name == "denoise"
    assert (told.fits(80.0), told.fits(20.0), told.fits(None)) == (True, False, None)


def test_what_cannot_be_drawn_is_said():
    with pytest.raises(OsjaxError, match="no aspect ratio"):
        found(aspect_ratio="7:5")


@pytest.mark.parametrize("mesh", ["data=1,seq=1", "data=2,seq=4"])
def test_a_pipeline_estimates_what_it_would_draw_and_loads_nothing(mesh):
    pipeline = Pipeline.load(mesh=mesh, dtype="fp32", progress=False)
    request = Request("a cat", resolution=None, height=32, width=48, num_frames=5, num_steps=3)
    told = pipeline.estimate([request, dataclasses.replace(request, seed=1)])
    assert (told.size, told.frames, told.passes, told.grid.tokens) == ((32, 48), 5, 6, 12)
    assert 0 < told.peak.total < 1
    assert not pipeline.residency._modules
