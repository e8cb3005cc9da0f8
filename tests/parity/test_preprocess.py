"""Parity of what is read and written: reference images and clips to model input, decoded values to uint8 frames."""

import numpy as np
import pytest
from PIL import Image

from osjax.media import read_image, resize_clip_to_cover, resize_to_cover, to_uint8
from tests.parity import cases

RUNS = cases.runs_of_kind("preprocess")
IMAGES = [run for run in RUNS if run[0].manifest["runs"][run[1]]["type"] == "image"]
CLIPS = [run for run in RUNS if run[0].manifest["runs"][run[1]]["type"] == "video"]
ONE_LEVEL = 2 / 255  # one step of uint8 in [-1, 1]


def test_every_run_is_an_image_or_a_clip():
    assert RUNS
    assert len(IMAGES) + len(CLIPS) == len(RUNS)


@pytest.mark.parametrize(("case", "run"), IMAGES, ids=cases.case_id)
def test_image(case, run):
    """uint8 within 1 (another version of the bicubic filter may round otherwise), model input within that one level."""
    options = case.manifest["runs"][run]
    path = case.folder / options["file"]
    reference = case.run(run, "outputs")
    with Image.open(path) as image:
        pixels = resize_to_cover(image, *options["size_hw"])
    assert pixels.dtype == np.uint8
    assert pixels.shape == reference["uint8"].shape
    assert np.max(np.abs(pixels.astype(int) - reference["uint8"])) <= 1
    x_thwc = read_image(path, *options["size_hw"])
    x_cthw = x_thwc.transpose(3, 0, 1, 2)
    assert x_cthw.shape == reference["x"].shape
    assert np.max(np.abs(x_cthw - reference["x"])) <= ONE_LEVEL + cases.PASS_TOLERANCE
    if np.array_equal(pixels, reference["uint8"]):
        cases.assert_close(x_cthw, reference["x"], what=run)


@pytest.mark.parametrize(("case", "run"), CLIPS, ids=cases.case_id)
def test_clip(case, run):
    options = case.manifest["runs"][run]
    frames_thwc = case.run(run, "inputs")["frames"].transpose(0, 2, 3, 1)
    x_thwc = resize_clip_to_cover(frames_thwc, *options["size_hw"])
    cases.assert_close(x_thwc.transpose(3, 0, 1, 2), case.run(run, "outputs")["x"], what=run)


@pytest.mark.parametrize("case", cases.of_kind("end_to_end"), ids=cases.case_id)
def test_frames_to_uint8(case):
    """From the reference's own decoded values, so the rounding alone is compared: exactly."""
    (video_cthw,) = case.outputs["video"]
    frames = to_uint8(video_cthw.transpose(1, 2, 3, 0))
    np.testing.assert_array_equal(frames, case.outputs["frames_uint8"])


@pytest.mark.parametrize("case", cases.of_kind("end_to_end"), ids=cases.case_id)
def test_reference_pixels(case):
    """The reference image as the autoencoder gets it."""
    for number, file in enumerate(case.manifest["run"]["ref_files"]):
        (pixels_cthw,) = case.outputs[f"ref_pixels_{number}"]
        x_thwc = read_image(case.folder / file, *pixels_cthw.shape[2:])
        assert np.max(np.abs(x_thwc.transpose(3, 0, 1, 2) - pixels_cthw)) <= ONE_LEVEL + cases.PASS_TOLERANCE
