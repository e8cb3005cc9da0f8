"""Reading the Video DC-AE's options; its table is tested with the published keys, its numbers in tests/parity."""

import pytest

from convert.dc_ae import read_config
from osjax.errors import OsjaxError
from osjax.models.dc_ae import DCAEConfig
from tests.convert.full_keys import read_full_keys


def test_absent_options_are_the_published_ones():
    assert read_config({}) == DCAEConfig()
    assert read_config(read_full_keys("F32T4C128_AE")[0]) == DCAEConfig()


def test_options_as_json_has_them():
    options = {"encoder": {"depth_list": [1] * 6, "block_type": ["ResBlock"] * 5 + ["EViTS5_GLU"]}, "scaling_factor": 2}
    assert read_config(options) == DCAEConfig(
        encoder_depths=(1,) * 6, encoder_attention=(False,) * 5 + (True,), scaling_factor=2
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tile_size": 2}, "unknown DC-AE options tile_size"),
        ({"decoder": {"width": 2}}, "unknown DC-AE decoder options width"),
        ({"encoder": {"out_norm": "rms3d"}}, "DC-AE encoder option out_norm is 'rms3d': only None is supported"),
        ({"use_quant_conv": True}, "DC-AE option use_quant_conv is True: only False is supported"),
        ({"decoder": {"block_type": ["EViT_GLU"]}}, "unknown DC-AE blocks EViT_GLU: use ResBlock or EViTS5_GLU"),
        ({"encoder": {"latent_channels": 64}}, "encoder's latent_channels is not the autoencoder's"),
        ({"time_compression_ratio": 8}, "time_compression_ratio is 8, the stages make it 4"),
        ({"spatial_compression_ratio": 64}, "spatial_compression_ratio is 64, the stages make it 32"),
    ],
)
def test_what_is_not_known_is_refused(options, message):
    with pytest.raises(OsjaxError, match=message):
        read_config(options)
