"""Every option of `osjax generate`, with the defaults of Open-Sora 2.0's inference configurations.

The other files here start from `get_config()` and change what differs. A field's type is the type of its default;
a field that may be None is None here, declared with `placeholder(type)`. What each option means is said once, in
`osjax/cli/options.py`.
"""

from ml_collections import ConfigDict
from ml_collections.config_dict import placeholder


def get_config() -> ConfigDict:
    """Return every option; the size of the video is left to the configuration."""
    return ConfigDict(
        {
            # what to make
            "prompt": placeholder(str),
            "negative_prompt": "",
            "dataset": {"data_path": placeholder(str)},
            "ref": placeholder(str),
            "cond_type": "t2v",
            "sampling_option": {
                "resolution": placeholder(str),
                "aspect_ratio": placeholder(str),
                "height": placeholder(int),
                "width": placeholder(int),
                "num_frames": 129,
                "extend": 0,
                "num_steps": 50,
                "guidance": 7.5,
                "guidance_img": 3.0,
                "text_osci": True,
                "image_osci": True,
                "scale_temporal_osci": True,
                "shift": True,
                "flow_shift": placeholder(float),
                "speed": "exact",
                "seed": placeholder(int),
            },
            "seed": 42,
            "motion_score": "4",
            "refine_prompt": False,
            "refine": {
                "model": "gpt-4o",
                "strict": False,
                "timeout_s": 60.0,
                "retries": 3,
                "at_once": 4,
            },
            "use_t2i2v": False,
            "img_resolution": "768px",
            "img_guidance": 4.0,
            "fps_save": 24,
            "sample_posterior": False,
            # which of it, and where to
            "save_dir": "samples",
            "num_sample": 1,
            "start_index": 0,
            "end_index": placeholder(int),
            "batch_size": 1,
            "dry_run": False,
            # with what
            "ckpt_path": placeholder(str),
            "lora": placeholder(str),
            "dtype": "bf16",
            "precision": placeholder(str),
            "mesh": "data=1,seq=1",
            "attention": "auto",
            "offload": False,
            "offload_blocks": placeholder(bool),
        }
    )
