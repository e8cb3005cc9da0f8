"""Text, image or clip to video at 768px with Open-Sora 2.0 (11.9 B parameters).

Source: https://github.com/hpcaitech/Open-Sora, configs/diffusion/inference/768px.py: as 256px, nine times the pixels.
Expected result: one H.264 mp4 of 1024 x 576 pixels, 129 frames at 24 fps (5.4 s), in samples/video_768px/; 80 forward
passes for text, 110 with a reference image. `launch/one_host.sh` shards it over all the GPUs of a machine.

    osjax generate 768px --ckpt_path BUNDLE --prompt "raining, sea"
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """Return the options of 16:9 video at 768px."""
    config = base.get_config()
    config.sampling_option.resolution = "768px"
    config.sampling_option.aspect_ratio = "16:9"
    return config
