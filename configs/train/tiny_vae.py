"""The autoencoder of the embedded tiny model, on shapes drawn anew for every batch. First of two stages.

Source: ours; the architecture is the Hunyuan VAE's, 4 x 8 x 8 compression and 16 channels, with narrow levels.
Expected result: runs/tiny_vae/bundle. Not settled yet: a first trial on one H100, with 8 groups of channels in its
norms, reached 24.5 dB in seven minutes, and 32 are wanted.

    osjax train tiny_vae
"""

from ml_collections import ConfigDict

from configs.train import base


def get_config() -> ConfigDict:
    """Return the options of the first stage."""
    config = base.get_config()
    config.stage = "vae"
    config.trained = ("vae",)
    config.new = ConfigDict(
        {
            "vae": {
                "kind": "hunyuan_vae",
                "block_out_channels": (16, 32, 64, 64),
                "norm_num_groups": 1,
                "layers_per_block": 2,
                "scale_factor": 1.0,
                "use_spatial_tiling": False,
            }
        }
    )
    config.run.update(steps=4000, batch_size=8, log_every=50, save_every=500)
    config.optim.update(lr=8e-4, betas=(0.9, 0.99), eps=1e-8, warmup_steps=100, schedule="cosine", ema_decay=0.998)
    config.vae.update(kl_weight=3e-4)
    config.data.update(resolution=("96px",), aspect_ratios=("1:1",), num_frames=(33,))
    return config
