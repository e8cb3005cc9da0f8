"""The autoencoder of the embedded tiny model, on clips: what moves. Second of four stages.

Source: ours. It goes on from the pictures of `tiny_image`, with more to see in every clip and fewer clips a step.
Expected result: runs/tiny_vae/bundle, 36.0 dB on average over 60 held-out scenes, whose colours, shapes and motions are
all read back rightly. Two H100 (run.mesh data=2) took 6.4 minutes, compilation included, at 51 ms a step. Not measured
on one.

    osjax train tiny_vae --ckpt_path runs/tiny_image/bundle
"""

from ml_collections import ConfigDict

from configs.train import tiny_image


def get_config() -> ConfigDict:
    """Return the options of the second stage."""
    config = tiny_image.get_config()
    config.new = ConfigDict()
    config.run.update(steps=5000, batch_size=8)
    config.optim.update(lr=1.5e-3)
    config.data.update(num_frames=(33,), clips=60_000)
    return config
