"""Conditions: which latent frames are given by references, and what is done with them.

b batch, t latent frames, h, w latent rows and columns, c latent channels, T, H, W the same in pixels, C colours.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
from collections.abc import Mapping, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from osjax.errors import OsjaxError

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class ConditionKind:
    """One kind of condition: where the references go, and how long each is.

    groups: length in groups of `ratio` frames, each one latent frame; 0 is a single image, one latent frame. A causal
    autoencoder has one frame and one latent more in front of the groups, so that 8 groups of 4 are 33 frames and 9
    latents, or 32 and 8 if it is not causal.
    """

    name: str
    head: bool
    tail: bool
    groups: int = 0

    @property
    def references(self) -> int:
        """How many references it takes (0, 1 or 2)."""
        return int(self.head) + int(self.tail)

    @property
    def is_image(self) -> bool:
        """Conditioned by images: guidance may scale over time, and the given latents are put back after sampling."""
        return self.references > 0 and self.groups == 0

    def latents(self, causal: bool = True) -> int:
        """Latent frames that each reference fills."""
        return self.groups + int(causal) if self.groups else 1

    def reference_frames(self, causal: bool = True, ratio: int = 4) -> int:
        """Pixel frames that each reference must have, at temporal compression `ratio`."""
        return ratio * self.groups + int(causal) if self.groups else 1

    def assign(self, references: Sequence[T]) -> list[tuple[T, bool]]:
        """Which reference conditions which end, as (reference, whether its last frames are meant), head before tail.

        `i2v_loop` with a single image starts and ends on it. Raises OsjaxError if their number is wrong.
        """
        if not min(1, self.references) <= len(references) <= self.references:
            raise OsjaxError(
                f"{self.name} takes {self.references} reference(s), got {len(references)}: give that many with --ref"
            )
        head = [(references[0], False)] if self.head else []
        return head + ([(references[-1], True)] if self.tail else [])

    def padding(self, causal: bool = True, ratio: int = 4) -> tuple[int, int]:
        """Frames to cut after decoding, (at the head, at the tail).

        An autoencoder that is not causal decodes the latent of an image to `ratio` frames, one of which is wanted.
        """
        extra = 0 if causal or not self.is_image else ratio - 1
        return extra * self.head, extra * self.tail


def _table(*kinds: ConditionKind) -> Mapping[str, ConditionKind]:
    return types.MappingProxyType({kind.name: kind for kind in kinds})


CONDITION_KINDS = _table(
    ConditionKind("t2v", head=False, tail=False),
    ConditionKind("i2v_head", head=True, tail=False),
    ConditionKind("i2v_tail", head=False, tail=True),
    ConditionKind("i2v_loop", head=True, tail=True),
    ConditionKind("v2v_head", head=True, tail=False, groups=8),
    ConditionKind("v2v_tail", head=False, tail=True, groups=8),
    ConditionKind("v2v_head_easy", head=True, tail=False, groups=16),
    ConditionKind("v2v_tail_easy", head=False, tail=True, groups=16),
)


def condition_kind(name: str) -> ConditionKind:
    """The kind of that name. Raises OsjaxError naming the nearest, if any is near, and all of them."""
    if name in CONDITION_KINDS:
        return CONDITION_KINDS[name]
    nearest = difflib.get_close_matches(name.lower(), CONDITION_KINDS, n=1)
    guess = f"did you mean {nearest[0]}? " if nearest else ""
    raise OsjaxError(f"unknown cond_type {name!r}: {guess}give one of {', '.join(CONDITION_KINDS)}")


def condition_masks(kind: ConditionKind, latent_frames: int, causal: bool = True) -> np.ndarray:
    """float32 [t]: 1 where a reference gives the latent frame. A single frame takes no reference: all 0.

    Raises OsjaxError if the video has fewer latent frames than the kind gives.
    """
    mask_t = np.zeros(latent_frames, np.float32)
    if latent_frames == 1:
        return mask_t
    given = kind.latents(causal)
    if kind.references and given > latent_frames:
        raise OsjaxError(f"{kind.name} gives {given} latent frames, the video has {latent_frames}: ask for more frames")
    if kind.head:
        mask_t[:given] = 1
    if kind.tail:
        mask_t[-given:] = 1
    return mask_t


def condition(
    shape_bthwc: tuple[int, int, int, int, int],
    references: Sequence[Sequence[jax.Array]],
    kind: ConditionKind,
    causal: bool = True,
    dtype: jnp.dtype = jnp.float32,
) -> tuple[jax.Array, jax.Array]:
    """(mask [b, t, h, w, 1], masked reference [b, t, h, w, c]): 1 and the latents where given, 0 elsewhere.

    references: for each sample its latents thwc, as `ConditionKind.assign` orders them; none: that sample is t2v.
    As upstream, a longer head reference gives its first latent frames and a longer tail reference its last.

    Raises OsjaxError if a reference, or the video, has too few latent frames.
    """
    b, t, h, w, c = shape_bthwc
    if len(references) != b:
        raise ValueError(f"references of {len(references)} samples for a batch of {b}")
    mask_t = condition_masks(kind, t, causal)
    mask_b = np.array([len(sample) > 0 for sample in references], np.float32)
    mask_bthw1 = np.broadcast_to(np.einsum("b,t->bt", mask_b, mask_t)[:, :, None, None, None], (b, t, h, w, 1))
    rows = [fill_ends(jnp.zeros((t, h, w, c), dtype), sample, kind, causal) for sample in references]
    return jnp.asarray(mask_bthw1, dtype), jnp.stack(rows)


def fill_ends(
    zeros_thwc: jax.Array, sample: Sequence[jax.Array], kind: ConditionKind, causal: bool = True
) -> jax.Array:
    """The latents of one sample's references, each thwc, at the ends that `kind` gives; zeros elsewhere.

    Without references, or in a single frame, there are zeros only. Raises OsjaxError for a reference that is too short.
    """
    if not sample or zeros_thwc.shape[0] == 1:
        return zeros_thwc
    given = kind.latents(causal)
    for reference in sample:
        if len(reference) < given:
            raise OsjaxError(f"{kind.name} needs {given} reference latents, got {len(reference)}: give a longer clip")
    filled = zeros_thwc
    if kind.head:
        filled = filled.at[:given].set(sample[0][:given])
    if kind.tail:
        filled = filled.at[-given:].set(sample[-1][-given:])
    return filled


def replace_references(
    z_bthwc: jax.Array, mask_bthw1: jax.Array, masked_ref_bthwc: jax.Array, kind: ConditionKind
) -> jax.Array:
    """Sampled latents with the given ones put back, in every sample that has them, ready to decode.

    Only images are put back, as upstream does; the latents of v2v clips stay as they were drawn.
    """
    if not kind.is_image:
        return z_bthwc
    return jnp.where(mask_bthw1 > 0, masked_ref_bthwc.astype(z_bthwc.dtype), z_bthwc)
