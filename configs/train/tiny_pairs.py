"""The embedded tiny model, on with other scenes, more of them of pairs. Last of four stages.

Source: ours. With scenes that `tiny_flow` has not seen, wide and tall ones as often as square ones, and the learning
rate's course once more.
Expected result: runs/tiny_pairs/bundle, which is the embedded one; loss 0.105. Pairs are right in 80.3 % (1:1), 78.7
(16:9) and 86.9 (9:16) of held-out prompts; the model's card has the rest. Two H200 (run.mesh data=2) took 7.3 minutes,
three of them for compiling and encoding; 25 ms a step. One H200 with 8000 steps of 60,000 clips took nine minutes for
less: 74 to 79 % with `two_things` 0.8, 69 to 75 % with 0.6, before stars were read as well as now.

    osjax train tiny_pairs --ckpt_path runs/tiny_flow/bundle
"""

from ml_collections import ConfigDict

from configs.train import tiny_flow


def get_config() -> ConfigDict:
    """Return the options of the last stage."""
    config = tiny_flow.get_config()
    config.new = ConfigDict()
    config.run.update(steps=10_000, save_every=5000, seed=43)
    config.optim.update(warmup_steps=300)
    config.data.update(aspect_ratios=("1:1", "16:9", "9:16"), clips=50_000, two_things=0.7)
    return config
