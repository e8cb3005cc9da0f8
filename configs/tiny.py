"""A small square clip, for the embedded bundle and for trying things out on a CPU.

Source: ours; the sampler is that of 256px with fewer steps, in float32 because CPUs are slow in bfloat16.
Expected result: one H.264 mp4 of 64 x 64 pixels, 17 frames at 24 fps (0.7 s), in samples/, within a minute on two
cores.

    osjax generate tiny --prompt "a red ball bouncing on sand"
"""

from ml_collections import ConfigDict

from configs import base


def get_config() -> ConfigDict:
    """Return the options of a 64 x 64 clip of 17 frames."""
    config = base.get_config()
    config.sampling_option.height = 64
    config.sampling_option.width = 64
    config.sampling_option.num_frames = 17
    config.sampling_option.num_steps = 20
    config.dtype = "fp32"
    return config
