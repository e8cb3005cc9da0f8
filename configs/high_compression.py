"""Text, image or clip to video at 768px with Open-Sora 2.0's high-compression model (11.9 B parameters, Video DC-AE).

Source: https://github.com/hpcaitech/Open-Sora, configs/diffusion/inference/high_compression.py: a latent is 32 x 32
pixels of 4 frames and a token of its own, so that a video has 18,432 tokens in place of the 76,032 of 768px.
Expected result: one H.264 mp4 of 1024 x 576 pixels, 128 frames at 24 fps (5.3 s), in samples/video_768px/, three frames
fewer for each reference image; 80 forward passes for text, 110 with a reference image. BUNDLE is made by
`osjax convert ckpts BUNDLE --model high_compression`.

    osjax generate high_compression --ckpt_path BUNDLE --prompt "raining, sea"
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """Return the options of 16:9 video at 768px, 4k frames long."""
    config = base.get_config()
    config.sampling_option.resolution = "768px"
    config.sampling_option.aspect_ratio = "16:9"
    config.sampling_option.num_frames = 128
    return config
