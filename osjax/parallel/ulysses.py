"""Sequence parallelism over heads: each device holds a slice of the tokens, and for attention all tokens of some heads.

DeepSpeed-Ulysses (Jacobs et al. 2023), section 3: one all-to-all before attention and one after it. To be called inside
`shard_map`. Neither the token counts nor the heads need to divide the axis: tokens are padded at the end of each device
group's streams and left out of the keys, heads are padded with zeros.

B batch, M tokens of the joint sequence held by a device, H heads, D head width, S devices on the axis.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from osjax.kernels.attention import Attention


@dataclasses.dataclass(frozen=True)
class JointSequence:
    """A text stream and an image stream, each cut into `shards` equal slices; a device holds one slice of both.

    text, image: numbers of true tokens. The gathered joint sequence runs device by device: text slice, image slice.
    """

    text: int
    image: int
    shards: int

    @property
    def text_slice(self) -> int:
        return -(-self.text // self.shards)

    @property
    def image_slice(self) -> int:
        return -(-self.image // self.shards)

    @property
    def text_padding(self) -> int:
        return self.text_slice * self.shards - self.text

    @property
    def image_padding(self) -> int:
        return self.image_slice * self.shards - self.image

    def true_ranges(self) -> list[tuple[int, int]]:
        """[start, stop) ranges of the gathered joint sequence that hold true tokens, neighbours merged."""
        ranges: list[tuple[int, int]] = []
        offset = 0
        for shard in range(self.shards):
            for size, total in ((self.text_slice, self.text), (self.image_slice, self.image)):
                true = min(size, max(0, total - shard * size))
                if true and ranges and ranges[-1][1] == offset:
                    ranges[-1] = (ranges[-1][0], offset + true)
                elif true:
                    ranges.append((offset, offset + true))
                offset += size
        return ranges

    def drop_padding(self, x_bmhd: jax.Array) -> jax.Array:
        """The true tokens of a gathered joint sequence. Static slices, so that attention never needs a mask."""
        ranges = self.true_ranges()
        if ranges == [(0, x_bmhd.shape[1])]:
            return x_bmhd
        return jnp.concatenate([x_bmhd[:, start:stop] for start, stop in ranges], axis=1)


def ulysses_attention(
    q_bmhd: jax.Array, k_bmhd: jax.Array, v_bmhd: jax.Array, *, sequence: JointSequence, attend: Attention, axis: str
) -> jax.Array:
    """Attention over the whole joint sequence from each device's slice of it.

    q, k, v [B, M, H, D] (M = text slice + image slice) → [B, M, H, D]. With one shard it is `attend` itself.
    """
    if sequence.shards == 1:
        return attend(q_bmhd, k_bmhd, v_bmhd)
    heads = q_bmhd.shape[2]
    spare = -heads % sequence.shards

    def to_heads(x_bmhd: jax.Array) -> jax.Array:
        padded = jnp.pad(x_bmhd, ((0, 0), (0, 0), (0, spare), (0, 0)))
        return jax.lax.all_to_all(padded, axis, split_axis=2, concat_axis=1, tiled=True)

    q, k, v = (to_heads(x) for x in (q_bmhd, k_bmhd, v_bmhd))
    out = attend(q, sequence.drop_padding(k), sequence.drop_padding(v))
    return jax.lax.all_to_all(out, axis, split_axis=1, concat_axis=2, tiled=True)[:, :, :heads]
