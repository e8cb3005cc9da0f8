"""Every option of `osjax train`, with the defaults of its dataclasses in `osjax/training/options.py`.

The other files here start from `get_config()` and change what differs. What each option means is said there and, in a
line each, in `osjax/cli/train_options.py`.
"""

import dataclasses

from ml_collections import ConfigDict

from osjax.training.options import TrainConfig


def get_config() -> ConfigDict:
    """Return every option; what is trained, and on what, is left to the configuration."""
    return ConfigDict(dataclasses.asdict(TrainConfig()))
