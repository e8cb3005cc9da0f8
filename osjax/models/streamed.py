"""An MMDiT in parts, which sampling takes block by block (`osjax/sampling/streaming.py`). What is computed is the same;
only the stack of all layers, which `MMDiT` scans over, is never whole.

Its blocks are all on the devices, where a scan would copy each one's weights out of the stack; or they wait in host
memory and come one by one, the next while one is at work, so that the devices hold the few layers around the blocks and
two or three blocks, whatever the depth.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
from flax import nnx

from osjax.models.mmdit import MMDiT, MMDiTConfig
from osjax.models.projections import copied

DOUBLE, SINGLE = "double_blocks", "single_blocks"  # attributes of MMDiT, and so how names of leaves begin
STACKS = (DOUBLE, SINGLE)


def is_stacked(leaf: str) -> bool:
    """Whether the leaf of that name has the layers of a stack as its first axis."""
    return leaf.startswith(tuple(f"{stack}." for stack in STACKS))


class Layers(NamedTuple):
    """An MMDiT in parts. rest: all of it but its two stacks; double, single: each of their layers by itself."""

    rest: MMDiT
    double: tuple[nnx.Module, ...]
    single: tuple[nnx.Module, ...]


def cut(model: MMDiT) -> Layers:
    """A model in parts; `model` stays as it is. Under `nnx.eval_shape` too."""
    rest = copied(model)
    for name in STACKS:
        delattr(rest, name)
    config = model.config
    return Layers(
        rest, _each(model.double_blocks, config.depth), _each(model.single_blocks, config.depth_single_blocks)
    )


def _each(stack: nnx.Module, count: int) -> tuple[nnx.Module, ...]:
    return tuple(jax.tree.map(lambda leaf, index=index: leaf[index], stack) for index in range(count))


class StreamedMMDiT:
    """A model in parts. layers: `rest` on the devices, the blocks too, or in host memory with something to `bring` one
    to the devices, which may return before it is there."""

    def __init__(self, layers: Layers, bring: Callable[[nnx.Module], nnx.Module] | None = None):
        self.layers = layers
        self.bring = bring
        self._coming: dict[int, nnx.Module] = {}

    @property
    def rest(self) -> MMDiT:
        """All but the blocks."""
        return self.layers.rest

    @property
    def config(self) -> MMDiTConfig:
        return self.rest.config

    @property
    def depth(self) -> int:
        """Blocks in all, double ones first."""
        return len(self.layers.double) + len(self.layers.single)

    @property
    def resident(self) -> nnx.Module | Layers:
        """What is on the devices all the while."""
        return self.layers if self.bring is None else self.rest

    def block(self, index: int, then: int | None = None) -> nnx.Module:
        """Block `index` on the devices; then: the one to send for now, because it will be asked for next."""
        block = self._coming.pop(index, None)
        self._coming.clear()
        block = self._bring(index) if block is None else block
        if then is not None:
            self._coming[then] = self._bring(then)
        return block

    def forget(self) -> None:
        """Lets go of a block that was sent for."""
        self._coming.clear()

    def _bring(self, index: int) -> nnx.Module:
        block = (*self.layers.double, *self.layers.single)[index]
        return block if self.bring is None else self.bring(block)
