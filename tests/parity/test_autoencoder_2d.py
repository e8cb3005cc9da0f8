"""FLUX's image autoencoder against the reference: posterior, its scaled mode, decoded frames. Kind `autoencoder_2d`."""

import jax.numpy as jnp
import numpy as np
import pytest

from convert import autoencoder_2d as table
from convert.rules import convert_module
from tests.parity import cases


@pytest.fixture(scope="module", params=cases.runs_of_kind("autoencoder_2d"), ids=lambda run: f"{run[0].name}-{run[1]}")
def built(request):
    case, run = request.param
    model = convert_module(table, cases.options(case, run), case.weights, jnp.float32)
    return model, case.run(run, "inputs"), case.run(run, "outputs")


def test_encode(built):
    model, given, expected = built
    x_bthwc = np.moveaxis(given["x"], 1, -1)
    for name, value in (("moments", model.moments(x_bthwc)), ("z", model.encode(x_bthwc))):
        cases.assert_close(np.moveaxis(np.asarray(value), -1, 1), expected[name], what=name)


def test_decode(built):
    model, given, expected = built
    frames_bthwc = model.decode(np.moveaxis(given["latent"], 1, -1))
    cases.assert_close(np.moveaxis(np.asarray(frames_bthwc), -1, 1), expected["dec"], what="dec")
