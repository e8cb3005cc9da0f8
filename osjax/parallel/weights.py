"""How trained weights lie over a training mesh: one table from a leaf's name to its PartitionSpec.

Axes: `data` and `fsdp` both shard the batch; `fsdp` shards every weight too, which is gathered for each block as it is
used (ZeRO stage 3, Rajbhandari et al. 2020); `tensor` shards heads and MLP columns (Shoeybi et al. 2019, section 3).
Dims that an axis does not divide stay whole, so that any mesh takes any model.
"""

from __future__ import annotations

import re

from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

# Leaf name → axes of its last dims; dims before them (the layers of a stack) are whole. The first match decides.
_TABLE: tuple[tuple[re.Pattern[str], tuple[str | None, ...]], ...] = tuple(
    (re.compile(pattern), axes)
    for pattern, axes in (
        (r".*\bqkv\.lin\.kernel", ("fsdp", None, "tensor", None)),  # [F, 3, H, D]
        (r".*\bqkv\.lin\.bias", (None, "tensor", None)),
        (r".*\b(mlp_in|in_layer)\.kernel", ("fsdp", "tensor")),
        (r".*\b(mlp_in|in_layer)\.bias", ("tensor",)),
        (r".*\b(proj|mlp_out|out|out_layer)\.kernel", ("tensor", "fsdp")),
        (r".*\.(bias|scale)", ()),
        (r".*", (None, "fsdp", None)),
        (r".*", ("fsdp", None)),
    )
)


def weight_spec(name: str, shape: tuple[int, ...], mesh: Mesh) -> P:
    """Where the weight `name` of that shape lies. Vectors are whole, or cut with the heads and columns that they are
    added to: they are small."""
    if len(shape) < 2:
        return P()
    for pattern, axes in _TABLE:
        if pattern.fullmatch(name) and len(axes) <= len(shape):
            first = len(shape) - len(axes)
            kept = (axis if axis and shape[first + i] % mesh.shape[axis] == 0 else None for i, axis in enumerate(axes))
            return P(*(None,) * first, *kept)
    return P()
