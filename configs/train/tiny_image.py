"""The autoencoder of the embedded tiny model, on single pictures of shapes. First of four stages.

Source: ours; the architecture is the Hunyuan VAE's, 4 x 8 x 8 compression and 16 channels, with narrow levels and one
norm group. Pictures come first because what an autoencoder lacks early is variety: 64 pictures a step teach it colours
and edges that 8 clips, which take as long, do not.
Expected result: runs/tiny_image/bundle, at 40 to 42 dB in training. Two H100 (run.mesh data=2) took 4.9 minutes,
compilation included, at 27 ms a step. Not measured on one.

    osjax train tiny_image
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
                "block_out_channels": (32, 64, 64, 64),
                "norm_num_groups": 1,
                "layers_per_block": 1,
                "scale_factor": 1.0,
                "use_spatial_tiling": False,
            }
        }
    )
    config.run.update(steps=6000, batch_size=64, log_every=50, save_every=2000)
    config.optim.update(
        lr=2e-3,
        betas=(0.9, 0.99),
        eps=1e-8,
        clip_norm=0.3,
        warmup_steps=100,
        schedule="cosine",
        ema_decay=0.998,
    )
    config.vae.update(l1_weight=0.05, kl_weight=1e-4)
    config.data.update(resolution=("96px",), aspect_ratios=("1:1", "16:9"), num_frames=(1,), clips=20_000)
    return config
