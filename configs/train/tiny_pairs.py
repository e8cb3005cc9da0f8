"""The embedded tiny model again, on more pairs of things, so that each gets its own colour, shape and motion. Last
of four stages.

Source: ours. After `tiny_flow` single things are right, pairs are not: at noise levels above 0.9 alone the prompt still
decides much, and few were drawn there; and next to CLIP's vector, which speaks of the whole prompt, T5's tokens, which
tell one thing from the other, had little left to explain. So levels are shifted further, in training and in sampling,
CLIP is left out more often than T5, and most clips show two things.
Expected result: runs/tiny_pairs/bundle, loss 0.127, which is of other noise levels and clips than that before. Of 200
held-out prompts 41 % of pairs are right; the model's card has the rest. Two H100 (run.mesh data=2) took 10.4 minutes,
compiling and encoding included; 26 ms a step.

    osjax train tiny_pairs --ckpt_path runs/tiny_flow/bundle
"""

from ml_collections import ConfigDict

from configs.train import tiny_flow


def get_config() -> ConfigDict:
    """Return the options of the last stage."""
    config = tiny_flow.get_config()
    config.new = ConfigDict()
    config.run.update(steps=15_000, seed=43)
    config.flow.update(t5_dropout=0.1, clip_dropout=0.6, flow_shift=6.0)
    config.data.update(clips=48_000, two_things=0.6)
    config.settings.update(flow_shift=6.0)
    return config
