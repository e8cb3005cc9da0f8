"""The Hunyuan VAE against the reference: posterior, its scaled mode, decoded video. Kind `hunyuan_vae`."""

import jax.numpy as jnp
import numpy as np
import pytest

from convert import hunyuan_vae as table
from convert.rules import convert_module
from tests.parity import cases


@pytest.fixture(scope="module", params=cases.runs_of_kind("hunyuan_vae"), ids=lambda run: f"{run[0].name}-{run[1]}")
def built(request):
    case, run = request.param
    vae = convert_module(table, cases.options(case, run), case.weights, jnp.float32)
    return vae, case.run(run, "inputs"), case.run(run, "outputs")


def test_encode(built):
    vae, given, expected = built
    x_bthwc = np.moveaxis(given["x"], 1, -1)
    for name, value in (("moments", vae.moments(x_bthwc)), ("z", vae.encode(x_bthwc))):
        cases.assert_close(np.moveaxis(np.asarray(value), -1, 1), expected[name], what=name)


def test_decode(built):
    vae, given, expected = built
    video_bthwc = vae.decode(np.moveaxis(given["latent"], 1, -1))
    cases.assert_close(np.moveaxis(np.asarray(video_bthwc), -1, 1), expected["dec"], what="dec")
