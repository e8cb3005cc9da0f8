"""Reading the Hunyuan VAE's options; its table is tested with the published keys, its numbers in tests/parity."""

import pytest

from convert.hunyuan_vae import read_config
from osjax.errors import OsjaxError
from osjax.models.hunyuan_vae import HunyuanVAEConfig


def test_absent_options_are_the_published_ones():
    assert read_config({}) == HunyuanVAEConfig()


def test_options_as_json_has_them():
    config = read_config({"block_out_channels": [32, 64], "sample_size": [128, 128], "scale_factor": 1, "dropout": 0.1})
    assert config == HunyuanVAEConfig(block_out_channels=(32, 64), sample_size=128, scale_factor=1)


def test_an_unknown_option_is_named():
    with pytest.raises(OsjaxError, match="unknown Hunyuan VAE options layer_per_block"):
        read_config({"layer_per_block": 2, "channel": False})
