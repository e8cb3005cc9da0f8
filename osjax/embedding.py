"""All texts first: what many groups of requests say is encoded before the first of them is drawn.

The text encoder is the second largest model; this way it comes to the devices once, and leaves them if it must.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import jax
import numpy as np
from tqdm import tqdm

from osjax.pipeline import Pipeline, Texts
from osjax.request import Request
from osjax.roles import prompt_used
from osjax.room import explaining_memory

FEW = 8  # batches of texts that need no bar of their own


def encode_all(pipeline: Pipeline, groups: Sequence[Sequence[Request]]) -> list[Texts]:
    """The texts of groups that are each drawn together, for `Pipeline.run`; they wait in host memory.

    A group's prompts are encoded together, which is what `run` does with those it was not given: the last bits depend
    on how many they are. What several groups say alike, such as no negative prompt, is encoded once and kept once.
    Raises OsjaxError if a device's memory is full.
    """
    pairs = [
        (
            tuple(prompt_used(request, pipeline.roles) for request in group),
            tuple(request.negative_prompt for request in group),
        )
        for group in groups
    ]
    distinct = dict.fromkeys(prompts for pair in pairs for prompts in pair)
    if not distinct:
        return []
    made = {}
    hidden = not pipeline.progress or len(distinct) <= FEW
    with (
        explaining_memory(lambda: pipeline.shortage(groups[0])),
        pipeline.residency.on_device("t5"),
        pipeline.residency.on_device("clip"),
        tqdm(total=len(distinct), desc="texts", unit="batch", disable=hidden) as bar,
    ):
        for prompts in distinct:
            start = time.perf_counter()
            made[prompts] = jax.tree.map(np.asarray, pipeline.encode_text(prompts)), time.perf_counter() - start
            bar.update()
    return [
        Texts(made[prompts][0], made[negative][0], made[prompts][1] + made[negative][1]) for prompts, negative in pairs
    ]
