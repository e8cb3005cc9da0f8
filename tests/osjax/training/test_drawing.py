"""Drawings against geometry: areas, centres, colours, edges, and what sizes of frames change."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from osjax.errors import OsjaxError
from osjax.training import drawing
from osjax.training.shapes import BACKGROUNDS, COLORS, GAP, SECONDS, SHAPES, Scene, Thing, scene, trajectory

SIZES = ((96, 96), (64, 144), (128, 64))
# Of a shape in a circle of radius 1: π, and from the coordinates of the corners of regular figures.
AREAS = {"circle": np.pi, "square": 2.0, "triangle": 0.75 * 3**0.5, "star": 5 * 0.42 * np.sin(np.pi / 5)}


def still(shape, **more):
    return Scene((Thing(shape, "white", "still", "large", 0.2, **more),), "black", 1)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("angle", [0.0, 0.4])
def test_area_and_centre(shape, angle):
    cover = drawing.draw_clip(still(shape, angle=angle), 96, 96, 1)[0, ..., 0] / 255
    # 1 %: the edge is a ramp over the distance to it, which is not quite the area of the pixel that it covers.
    assert cover.sum() == pytest.approx(AREAS[shape] * (0.2 * 96) ** 2, rel=0.01)
    rows, columns = np.mgrid[:96, :96] + 0.5
    assert (cover * columns).sum() / cover.sum() == pytest.approx(48, abs=0.05)
    assert (cover * rows).sum() / cover.sum() == pytest.approx(48, abs=0.05)


def test_shapes_stand_upright():
    mask = {shape: drawing.draw_clip(still(shape), 96, 96, 1)[0, ..., 0] > 127 for shape in SHAPES}
    top, bottom = mask["triangle"].sum(axis=1)[mask["triangle"].any(axis=1)][[0, -1]]
    assert top < 5 < bottom  # a tip above, a side below
    assert np.ptp(mask["square"].sum(axis=1)[mask["square"].any(axis=1)]) == 0
    for shape in SHAPES:
        np.testing.assert_array_equal(mask[shape], mask[shape][:, ::-1])


def test_angles_turn_clockwise_as_seen():
    turned = drawing.draw_clip(still("triangle", angle=np.pi / 2), 96, 96, 1)[0, ..., 0] > 127
    columns = turned.sum(axis=0)[turned.any(axis=0)]
    assert columns[0] > 5 > columns[-1]  # the tip points to the right


def test_an_edge_is_one_pixel_wide():
    row = drawing.draw_clip(still("square"), 96, 96, 1)[0, 48, :, 0]
    assert np.count_nonzero((row > 0) & (row < 255)) <= 2  # one on either side
    assert set(row[30:34]) == {0}
    assert row[48] == 255


@pytest.mark.parametrize("size", SIZES)
def test_a_scene_is_where_it_says(size):
    made = scene(0, 3)
    clip = drawing.draw_clip(made, *size)
    assert clip.shape == (33, *size, 3)
    assert clip.dtype == np.uint8
    side, progress = min(size), np.arange(33) / (24 * SECONDS)
    stage = made.stage * np.array([size[1] - side, size[0] - side])
    for thing in made.things:
        centre, _, _ = trajectory(thing, made.score, progress)
        for frame, (x, y) in zip(clip, stage + centre * side, strict=True):
            assert np.abs(frame[int(y), int(x)].astype(int) - COLORS[thing.color]).max() <= 1
    assert np.abs(np.median(clip.reshape(-1, 3), axis=0) - BACKGROUNDS[made.background]).max() <= 1


def test_the_stage_slides_along_the_longer_side():
    left, right = (drawing.tracks(dataclasses.replace(still("circle"), stage=at), 64, 144, 1) for at in (0.0, 1.0))
    np.testing.assert_allclose(right.centre[0] - left.centre[0], [[144 - 64, 0]])
    high, low = (drawing.tracks(dataclasses.replace(still("circle"), stage=at), 128, 64, 1) for at in (0.0, 1.0))
    np.testing.assert_allclose(low.centre[0] - high.centre[0], [[0, 128 - 64]])


@settings(max_examples=100, deadline=None)
@given(index=st.integers(0, 2**31), size=st.sampled_from([(64, 144), (128, 64), (64, 127), (48, 200)]))
def test_two_things_stay_in_any_frame_and_apart(index, size):
    """Closer than GAP by 0.02 at most, which is what may happen between the moments that are looked at."""
    made = scene(0, index, two_things=1.0)
    clip, side = drawing.tracks(made, *size), min(size)
    for axis, length in enumerate(size[::-1]):
        assert (clip.centre[..., axis] - clip.radius).min() > -1e-3
        assert (clip.centre[..., axis] + clip.radius).max() < length + 1e-3
    distance = np.linalg.norm(clip.centre[0] - clip.centre[1], axis=-1) - clip.radius.sum(axis=0)
    assert distance.min() > (GAP - 0.02) * side


@pytest.mark.parametrize(("size", "axis"), [((64, 144), 0), ((128, 64), 1), ((96, 96), 0), ((64, 127), 0)])
def test_a_frame_of_two_stages_has_one_thing_on_each(size, axis):
    """Nearly always: some things that pass each other share a stage. With less room all do."""
    side, own = min(size), 0
    for made in (scene(0, i, two_things=1.0) for i in range(100)):
        clip = drawing.tracks(made, *size)
        shared = [side * trajectory(thing, made.score, np.zeros(1))[0][0, axis] for thing in made.things]
        begins = clip.centre[:, 0, axis] - shared
        own += abs(begins[0] - begins[1]) > side - 1e-3
    assert own == 0 if max(size) < 2 * side else own > 80


def test_a_batch_draws_what_each_would_be_alone():
    scenes = [scene(2, i) for i in range(5, 10)]
    assert {len(each.things) for each in scenes} == {1, 2}
    drawn = drawing.draw(drawing.stack([drawing.tracks(each, 32, 48, 5) for each in scenes]), 32, 48)
    assert drawn.dtype == np.float32
    assert -1 <= drawn.min() <= drawn.max() <= 1
    for each, clip in zip(scenes, drawn, strict=True):
        alone = drawing.draw(drawing.stack([drawing.tracks(each, 32, 48, 5)]), 32, 48)[0]
        np.testing.assert_allclose(clip, alone, atol=1e-5)  # float32, summed in another order at most


def test_only_things_that_are_there_are_drawn():
    one = still("circle")
    nothing = drawing.draw_clip(dataclasses.replace(one, things=()), 32, 32, 1)
    assert not nothing.any()
    assert len(np.unique(drawing.draw_clip(one, 32, 32, 1).reshape(-1, 3), axis=0)) > 2


def test_frames_are_moments():
    thing = Thing("circle", "red", "right", "small", 0.12, x=0.2, heading=(1.0, 0.0))
    moving = Scene((thing,), "black", 7)
    at_24, at_12 = drawing.tracks(moving, 96, 96, 33, 24), drawing.tracks(moving, 96, 96, 17, 12)
    np.testing.assert_allclose(at_24.centre[:, ::2], at_12.centre)
    assert at_24.centre[0, -1, 0] - at_24.centre[0, 0, 0] == pytest.approx(0.6 * 96, abs=1e-4)
    with pytest.raises(OsjaxError, match="too long"):
        drawing.tracks(moving, 96, 96, 129, 24)


def test_memory_is_a_few_times_the_output():
    batch = drawing.stack([drawing.tracks(scene(0, i), 48, 48) for i in range(8)])
    plan = jax.jit(lambda b: drawing.draw(b, 48, 48)).lower(batch).compile().memory_analysis()
    assert plan.temp_size_in_bytes < 6 * plan.output_size_in_bytes
