"""Step caching: most blocks of a forward pass are left out where the last full one tells what they would add.

From step to step the blocks add nearly the same to the image tokens. The first double block is always computed; what
all others added when the branch was last computed in full is then added once more. Approximate, unlike all else in the
sampler. A schedule says when passes are computed in full, as FORA's static caching does (Selvaraju et al. 2024), but at
growing distances. They are, too, where what the first block adds has changed by much, after "Timestep Embedding Tells"
(TeaCache, Liu et al. 2024, section 3), with that block in place of a fitted function of the timestep, as ParaAttention
has it.

A schedule computes all branches at the same steps. Guidance amplifies their difference, and that of what was added at
different steps is wrong by more than either; a limit low enough to decide by itself, branch by branch, took more passes
to be as near (docs/performance.md). Every branch has a memory of its own.

B batch, N image tokens, F features, K guidance branches; other letters as in `osjax/models/mmdit.py`.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from osjax.models.mmdit import JointAttention, MMDiT
from osjax.models.operations import BY_XLA, Operations
from osjax.models.rope import Rope
from osjax.sampling.guidance import OSCILLATION_START, GuidedStep


@dataclasses.dataclass(frozen=True)
class Reuse:
    """Which passes are computed in full.

    first: share of the steps, at the beginning, that are; growth: so many times as far from the beginning as the last
    of these comes the next one, and so on, infinite for none; limit: relative change of what the first block adds since
    then from which on a pass is computed in full at any step.
    """

    first: float
    growth: float
    limit: float = np.inf

    def __post_init__(self) -> None:
        if not self.growth > 1:
            raise ValueError(f"steps in full that come {self.growth} times as far as the last ones never end")

    def steps_in_full(self, steps: int) -> frozenset[int]:
        """Of so many steps, those at which all passes are. From where guidance rests at odd steps on, they are even."""
        found, mark = set(range(math.ceil(self.first * steps))), max(1.0, self.first * steps)
        while (mark := mark * self.growth) < steps:
            step = round(mark)
            found.add(step + (step >= OSCILLATION_START and step % 2))
        return frozenset(step for step in found if step < steps)

    def limit_at(self, step: int, steps: int) -> np.float32:
        """The limit at a step; 0 lets nothing be left out."""
        return np.float32(0 if step in self.steps_in_full(steps) else self.limit)

    def passes_in_full(self, plan: Sequence[GuidedStep]) -> int:
        """Of one video, where nothing changes by `limit`."""
        return sum(len(plan[step].branches) for step in self.steps_in_full(len(plan)))


SUDDEN = 2.0  # more than any of the embedded model's clips changes between two passes in full by these schedules
SPEEDS = {"exact": None, "balanced": Reuse(0.1, 1.3, SUDDEN), "fast": Reuse(0.1, 1.7, SUDDEN)}


class Kept(NamedTuple):
    """Of the last pass in full, what was added to the image tokens: by the first block, and by all others; [B, N, F]
    each, and with K in front for all branches. known: whether there was such a pass."""

    first_bnf: jax.Array
    others_bnf: jax.Array
    known: jax.Array


def nothing_kept(branches: int, batch: int, tokens: int, features: int, dtype: jnp.dtype) -> Kept:
    """What is kept before the first step: arrays [K, B, N, F] of that dtype; no branch is known."""
    empty = jnp.zeros((branches, batch, tokens, features), dtype)
    return Kept(empty, jnp.copy(empty), jnp.zeros(branches, bool))


def cached_forward(
    model: MMDiT,
    kept: Kept,
    limit: jax.Array,
    valid_bn: jax.Array,
    everywhere: Callable[[jax.Array], jax.Array],
    embedded: tuple[jax.Array, jax.Array, jax.Array],
    rope: Rope,
    attention: JointAttention,
    operations: Operations = BY_XLA,
) -> tuple[jax.Array, Kept, jax.Array]:
    """(velocity [B, N, C], what is kept now, whether all blocks were computed).

    kept: of this branch; limit: float32, as `Reuse.limit_at` gives it; embedded: what `model.embed` gives; rope over
    the N tokens. valid_bn: 1 for tokens, 0 for padding; everywhere: sums a number over the devices, which all decide
    alike.
    """
    img_bnf, txt_blf, vec_bf = embedded
    block = jax.tree.map(lambda leaf: leaf[0], model.double_blocks)
    after_bnf, _ = block(img_bnf, txt_blf, vec_bf, rope, attention, operations)
    first_bnf = after_bnf - img_bnf
    full = is_due(kept, first_bnf, limit, valid_bn, everywhere)

    def compute() -> tuple[jax.Array, Kept]:
        x_bnf = model.blocks(img_bnf, txt_blf, vec_bf, rope, attention, operations=operations)
        return x_bnf, Kept(first_bnf, x_bnf - after_bnf, jnp.ones_like(kept.known))

    def add_again() -> tuple[jax.Array, Kept]:
        return after_bnf + kept.others_bnf, kept

    x_bnf, kept = jax.lax.cond(full, compute, add_again)
    return model.final_layer(x_bnf, vec_bf), kept, full


def is_due(
    kept: Kept,
    first_bnf: jax.Array,
    limit: jax.Array,
    valid_bn: jax.Array,
    everywhere: Callable[[jax.Array], jax.Array],
) -> jax.Array:
    """Whether a branch must be computed in full, by what its first block adds now; arguments as in `cached_forward`."""

    def size(x_bnf: jax.Array) -> jax.Array:
        return everywhere(jnp.sum(jnp.abs(x_bnf.astype(jnp.float32)).sum(axis=-1) * valid_bn))

    change = size(first_bnf - kept.first_bnf) / jnp.maximum(size(kept.first_bnf), jnp.finfo(jnp.float32).tiny)
    return ~kept.known | (change >= limit)
