"""Autoencoders against the reference: posterior where there is one, latents, decoded frames.

Kinds `hunyuan_vae`, `autoencoder_2d` (FLUX's) and `dc_ae`, plain and tiled.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from convert import autoencoder_2d, dc_ae, hunyuan_vae
from convert.rules import convert_module
from tests.parity import cases

TABLES = {"hunyuan_vae": hunyuan_vae, "autoencoder_2d": autoencoder_2d, "dc_ae": dc_ae}
RUNS = [run for kind in TABLES for run in cases.runs_of_kind(kind)]


@pytest.fixture(scope="module", params=RUNS, ids=lambda run: f"{run[0].name}-{run[1]}")
def built(request):
    case, run = request.param
    model = convert_module(TABLES[case.kind], cases.options(case, run), case.weights, jnp.float32)
    return model, case.run(run, "inputs"), case.run(run, "outputs")


def assert_close(ours_bthwc, theirs, what):
    cases.assert_close(np.moveaxis(np.asarray(ours_bthwc), -1, 1), theirs, what=what)


def test_encode(built):
    model, given, expected = built
    x_bthwc = np.moveaxis(given["x"], 1, -1)
    if hasattr(model, "moments"):  # the DC-AE is deterministic
        assert_close(model.moments(x_bthwc), expected["moments"], "moments")
    assert_close(model.encode(x_bthwc), expected["z"], "z")


def test_decode(built):
    model, given, expected = built
    assert_close(model.decode(np.moveaxis(given["latent"], 1, -1)), expected["dec"], "dec")
