"""All 11.9 billion weights of Open-Sora 2.0, on clips of your own at 256px, sharded over eight GPUs.

Source: Open-Sora 2.0's rate, clipping, dropout and conditions (technical report, section 4).
Expected result: runs/full_256px/bundle. Weights, moments and averages take 16 bytes a weight before activations: see
docs/performance.md for how many GPUs that is.

    osjax train full_256px --ckpt_path bundles/open_sora_v2 --data.path clips.csv
"""

from ml_collections import ConfigDict

from configs.train import base


def get_config() -> ConfigDict:
    """Return the options; what is not named here is the default of `configs/train/base.py`."""
    config = base.get_config()
    config.run.update(steps=10_000, batch_size=8, mesh="fsdp=8", save_every=500)
    config.optim.update(warmup_steps=100)
    config.data.update(
        resolution=("256px",), aspect_ratios=("16:9", "1:1", "9:16"), num_frames=(129, 65, 33), cache="runs/cache"
    )
    return config
