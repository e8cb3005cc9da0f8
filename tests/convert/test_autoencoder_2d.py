"""Options of FLUX's autoencoder; its table is tested with the published keys, its numbers in tests/parity."""

import pytest

from convert.autoencoder_2d import read_config
from osjax.errors import OsjaxError
from osjax.models.autoencoder_2d import Autoencoder2DConfig


def test_absent_options_are_the_published_ones():
    assert read_config({}) == Autoencoder2DConfig()


def test_options_as_json_has_them():
    options = {"ch": 32, "ch_mult": [1, 2], "resolution": 256, "sample": True}
    assert read_config(options) == Autoencoder2DConfig(ch=32, ch_mult=(1, 2))


def test_an_unknown_option_is_named():
    with pytest.raises(OsjaxError, match="unknown FLUX autoencoder options chanels"):
        read_config({"chanels": 2})
