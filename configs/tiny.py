"""A short clip by the embedded bundle, on a CPU as on anything else.

Source: ours; the sampler is that of 256px with fewer steps, in float32 because CPUs are slow in bfloat16.
Expected result: one H.264 mp4 of 96 x 96 pixels, 33 frames at 24 fps (1.4 s), in samples/, within half a minute on two
cores. The model knows 1:1, 16:9 and 9:16.

    osjax generate tiny --prompt "a red circle moves to the right on a navy background"
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """Return the options of a clip of 33 frames."""
    config = base.get_config()
    config.sampling_option.resolution = "96px"
    config.sampling_option.aspect_ratio = "1:1"
    config.sampling_option.num_frames = 33
    config.sampling_option.num_steps = 30
    config.sampling_option.flow_shift = 6.0  # as it was trained
    config.dtype = "fp32"
    return config
