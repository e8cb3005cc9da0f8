"""Text, image or clip to video at 256px with Open-Sora 2.0 (11.9 B parameters).

Source: https://github.com/hpcaitech/Open-Sora, configs/diffusion/inference/256px.py: 50 steps, guidance 7.5 for the
text and 3 for the image, both oscillating.
Expected result: one H.264 mp4 of 336 x 192 pixels, 129 frames at 24 fps (5.4 s), in samples/video_256px/; 80 forward
passes for text, 110 with a reference image.

    osjax generate 256px --ckpt_path BUNDLE --prompt "raining, sea"
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """Return the options of 16:9 video at 256px."""
    config = base.get_config()
    config.sampling_option.resolution = "256px"
    config.sampling_option.aspect_ratio = "16:9"
    return config
