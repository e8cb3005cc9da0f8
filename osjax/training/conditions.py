"""Which latent frames of a training clip are given: one condition kind is drawn for each clip, by weight.

B clips, t/h/w latent frames/rows/columns, c latent channels.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp

from osjax.errors import OsjaxError
from osjax.sampling.condition import ConditionKind, condition_kind, condition_masks, fill_ends
from osjax.training.batches import End, Latents
from osjax.training.flow import Clean


def drawn_kinds(weights: Mapping[str, float]) -> dict[str, ConditionKind]:
    """The kinds that have a weight above 0. Raises OsjaxError for an unknown kind, or if there is none."""
    kinds = {name: condition_kind(name) for name, weight in weights.items() if weight > 0}
    if not kinds:
        raise OsjaxError("flow.conditions draws no kind: give at least one, such as t2v, a weight above 0")
    return kinds


def ends_of(kind: ConditionKind, ratio: int) -> tuple[End, ...]:
    """The ends that a kind gives, each so many pixel frames long, at temporal compression `ratio`."""
    frames = kind.reference_frames(ratio=ratio)
    return (("head", frames),) * kind.head + (("tail", frames),) * kind.tail


def all_ends(weights: Mapping[str, float], ratio: int) -> tuple[End, ...]:
    """The ends that any of the drawn kinds gives, each once."""
    return tuple(sorted({end for kind in drawn_kinds(weights).values() for end in ends_of(kind, ratio)}))


def condition_clips(latents: Latents, weights: Mapping[str, float], ratio: int, key: jax.Array) -> Clean:
    """Draws a kind for each clip and gives its ends as they were encoded by themselves.

    Kinds that would give a clip of this length whole are not drawn; a single frame is given nothing. Raises OsjaxError
    if no kind is left.
    """
    z_bthwc = latents.z_bthwc
    batch, t = z_bthwc.shape[:2]
    fitting = {name: kind for name, kind in drawn_kinds(weights).items() if t == 1 or _given(kind) < t}
    if not fitting:
        raise OsjaxError(f"no kind of flow.conditions leaves anything to learn of {t} latent frames: add t2v")
    odds = jnp.log(jnp.asarray([weights[name] for name in fitting], jnp.float32))
    drawn_b = jax.random.categorical(key, odds, shape=(batch,))
    mask_bt, given_bthwc = jnp.zeros((batch, t), z_bthwc.dtype), jnp.zeros_like(z_bthwc)
    for number, kind in enumerate(fitting.values()):
        chosen_b = drawn_b == number
        mask_bt = jnp.where(chosen_b[:, None], condition_masks(kind, t), mask_bt)
        references = [latents.ends[end] for end in ends_of(kind, ratio)] if t > 1 else []
        filled_bthwc = jax.vmap(functools.partial(fill_ends, kind=kind))(jnp.zeros_like(z_bthwc), references)
        given_bthwc = jnp.where(chosen_b[:, None, None, None, None], filled_bthwc, given_bthwc)
    mask_bthw1 = jnp.broadcast_to(mask_bt[:, :, None, None, None], (*z_bthwc.shape[:-1], 1))
    return Clean(z_bthwc, mask_bthw1, given_bthwc)


def _given(kind: ConditionKind) -> int:
    """Latent frames that a kind gives in all."""
    return kind.latents() * kind.references
