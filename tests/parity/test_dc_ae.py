"""The Video DC-AE against the reference, plain and tiled: latents, decoded video. Kind `dc_ae`."""

import jax.numpy as jnp
import numpy as np
import pytest

from convert import dc_ae as table
from convert.rules import convert_module
from tests.parity import cases


@pytest.fixture(scope="module", params=cases.runs_of_kind("dc_ae"), ids=lambda run: f"{run[0].name}-{run[1]}")
def built(request):
    case, run = request.param
    model = convert_module(table, cases.options(case, run), case.weights, jnp.float32)
    return model, case.run(run, "inputs"), case.run(run, "outputs")


def test_encode(built):
    model, given, expected = built
    z_bthwc = model.encode(np.moveaxis(given["x"], 1, -1))
    cases.assert_close(np.moveaxis(np.asarray(z_bthwc), -1, 1), expected["z"], what="z")


def test_decode(built):
    model, given, expected = built
    video_bthwc = model.decode(np.moveaxis(given["latent"], 1, -1))
    cases.assert_close(np.moveaxis(np.asarray(video_bthwc), -1, 1), expected["dec"], what="dec")
