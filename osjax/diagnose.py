"""Which layer's output stops being finite first: the same computation once more, each layer of it watched.

The layers of a copy of the model are wrapped, so that what runs is the very function that failed, on its mesh and in
its tiles. It is compiled anew and waits for the host at every layer; nothing of it is there as long as all is well.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from osjax.errors import OsjaxError
from osjax.models.clip import CLIPText
from osjax.models.dc_ae import DCAE
from osjax.models.mmdit import MMDiT
from osjax.models.projections import copied
from osjax.models.streamed import Layers, StreamedMMDiT
from osjax.models.t5 import T5Encoder

Model = TypeVar("Model", bound=nnx.Module | StreamedMMDiT)
DOUBLE_BLOCK, SINGLE_BLOCK, FINAL_LAYER = "double block {}", "single block {}", "the final layer"  # of an MMDiT


@dataclasses.dataclass(frozen=True)
class _Place:
    """Where a layer stands: `owner.key`, or `owner[key]` of a list. layers: how many a stack of them holds, or None."""

    label: str
    owner: Any
    key: str | int
    layers: int | None = None


class Notes:
    """What was seen of the layers, which `labels` names in the order in which they run."""

    def __init__(self, labels: Sequence[str]):
        self._labels = labels
        self._bad: dict[tuple[int, int], bool] = {}

    def see(self, place: int, index: Any, entered: Any, left: Any) -> None:
        """That finite arrays entered layer `index` of a place, and left it, or not; each device tells of its part."""
        if not left:
            key = place, int(index)
            self._bad[key] = bool(entered) and self._bad.get(key, True)

    def first(self) -> str | None:
        """`in …` the first layer that made something not finite, `before …` if it was there already; None: nothing."""
        if not self._bad:
            return None
        place, index = min(self._bad)
        return f"{'in' if self._bad[place, index] else 'before'} {self._labels[place].format(index + 1)}"


class Watched(nnx.Module):
    """A layer, or a stack of them to be scanned, that has its inputs and outputs looked at. index: int32, its place in
    the stack; of a stack, [layers]."""

    def __init__(self, layer: nnx.Module, index: jax.Array, place: int, notes: Notes):
        self.layer = layer
        self.index = nnx.Variable(index)
        self.place = place
        self.notes = notes

    def __call__(self, *inputs: Any) -> Any:
        outputs = self.layer(*inputs)
        see = functools.partial(self.notes.see, self.place)
        jax.debug.callback(see, self.index[...], _finite(inputs), _finite(outputs))
        return outputs


def first_bad_layer(model: Model, run: Callable[[Model], Any]) -> str | None:
    """Runs `run(model)` again and says where it stops being finite, as `Notes.first` does."""
    watched, notes = _watched_in_parts(model) if isinstance(model, StreamedMMDiT) else _watched(model)
    jax.block_until_ready(run(watched))
    jax.effects_barrier()
    return notes.first()


def _watched(model: nnx.Module) -> tuple[nnx.Module, Notes]:
    watched = copied(model)
    places = list(_places(watched))
    notes = Notes([place.label for place in places])
    for number, place in enumerate(places):
        index = jnp.asarray(0) if place.layers is None else jnp.arange(place.layers)
        if isinstance(place.key, int):
            place.owner[place.key] = Watched(place.owner[place.key], index, number, notes)
        else:
            setattr(place.owner, place.key, Watched(getattr(place.owner, place.key), index, number, notes))
    return watched, notes


def _watched_in_parts(model: StreamedMMDiT) -> tuple[StreamedMMDiT, Notes]:
    notes = Notes([DOUBLE_BLOCK, SINGLE_BLOCK, FINAL_LAYER])
    rest, double, single = model.layers
    rest = copied(rest)
    rest.final_layer = Watched(rest.final_layer, jnp.asarray(0), 2, notes)
    double, single = (
        tuple(Watched(block, jnp.asarray(index), place, notes) for index, block in enumerate(blocks))
        for place, blocks in enumerate((double, single))
    )
    return StreamedMMDiT(Layers(rest, double, single), model.bring), notes


def not_finite(what: str, layer: str | None, dtype: jnp.dtype, otherwise: str) -> OsjaxError:
    """The error for `what` that is not finite. layer: where it began; otherwise: what to do if no layer is to blame."""
    if layer is None:
        return OsjaxError(f"{what} not finite: nothing was saved; {otherwise}")
    mend = "use --dtype bf16" if dtype == jnp.float16 else "convert the bundle again, or leave out the LoRAs"
    return OsjaxError(f"{what} not finite, first {layer}: nothing was saved; {mend}")


def _places(model: nnx.Module) -> Iterator[_Place]:
    """The layers of a model in the order in which they run."""
    if isinstance(model, MMDiT):
        yield _Place(DOUBLE_BLOCK, model, "double_blocks", model.config.depth)
        yield _Place(SINGLE_BLOCK, model, "single_blocks", model.config.depth_single_blocks)
        yield _Place(FINAL_LAYER, model, "final_layer")
    elif isinstance(model, T5Encoder):
        yield _Place("block {} of T5", model, "blocks", model.config.num_layers)
    elif isinstance(model, CLIPText):
        yield _Place("block {} of CLIP", model, "blocks", model.config.num_hidden_layers)
    elif isinstance(model, DCAE):
        yield from _stages("encoder", model.encoder.stages)
        yield from reversed(list(_stages("decoder", model.decoder.stages)))
    else:
        for name, network in (("encoder", model.encoder), ("decoder", model.decoder)):
            yield from _residual(name, network)


def _stages(name: str, stages: nnx.List) -> Iterator[_Place]:
    for number, stage in enumerate(stages, 1):
        for index in range(len(stage)):
            yield _Place(f"block {index + 1} of stage {number} of the {name}", stage, index)


def _residual(name: str, network: nnx.Module) -> Iterator[_Place]:
    middle = _Place(f"the middle of the {name}", network, "mid_block")
    yield _Place(f"the first convolution of the {name}", network, "conv_in")
    if name == "decoder":
        yield middle
    for index in range(len(network.levels)):
        yield _Place(f"level {index + 1} of the {name}", network.levels, index)
    if name == "encoder":
        yield middle
    yield _Place(f"the last convolution of the {name}", network, "conv_out")


def _finite(arrays: Any) -> jax.Array:
    """Whether all floating arrays of a pytree are; what else is in it counts for nothing."""
    leaves = [leaf for leaf in jax.tree.leaves(arrays) if isinstance(leaf, jax.Array)]
    checks = [jnp.isfinite(leaf).all() for leaf in leaves if jnp.issubdtype(leaf.dtype, jnp.floating)]
    return functools.reduce(jnp.logical_and, checks, jnp.asarray(True))
