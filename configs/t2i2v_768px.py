"""Text to video at 768px by way of a picture: FLUX.1-dev draws it, Open-Sora 2.0 lets it move (11.9 B parameters each).

Source: https://github.com/hpcaitech/Open-Sora, configs/diffusion/inference/t2i2v_768px.py: a picture at 768px with
guidance 4 and 50 steps, which is then the first frame (i2v_head).
Expected result: one H.264 mp4 of 1024 x 576 pixels, 129 frames at 24 fps (5.4 s), in samples/video_768px/, and the
picture of 1024 x 576 in its folder generated_condition/; 50 forward passes of FLUX, 110 of the video's model. BUNDLE
holds FLUX too: `osjax download flux1-dev` beside the other checkpoints, then `osjax convert`. With --offload True one
of the two models is on the device at a time.

    osjax generate t2i2v_768px --ckpt_path BUNDLE --prompt "raining, sea" --offload True
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """Return the options of 16:9 video at 768px that starts from a picture."""
    config = base.get_config()
    config.use_t2i2v = True
    config.sampling_option.resolution = "768px"
    config.sampling_option.aspect_ratio = "16:9"
    return config
