"""A LoRA of rank 32 for Open-Sora 2.0, on clips of your own at 256px.

Source: the loss, dropout and conditions are those that Open-Sora 2.0 was trained with; rank and rate are ours.
Expected result: runs/lora_256px/lora, for `osjax generate --lora`; latents and embeddings stay in runs/cache.

    osjax train lora_256px --ckpt_path bundles/open_sora_v2 --data.path clips.csv
"""

from ml_collections import ConfigDict

from configs.train import base


def get_config() -> ConfigDict:
    """Return the options; what is not named here is the default of `configs/train/base.py`."""
    config = base.get_config()
    config.lora.update(rank=32, alpha=32.0)
    config.run.update(steps=2000, batch_size=1, save_every=250)
    config.optim.update(lr=1e-4, warmup_steps=50, accumulate=4, ema_decay=0.0)
    config.data.update(
        resolution=("256px",), aspect_ratios=("16:9", "1:1", "9:16"), num_frames=(129, 65, 33), cache="runs/cache"
    )
    return config
