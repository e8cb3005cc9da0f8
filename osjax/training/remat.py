"""What the backward pass computes again instead of finding it kept: memory against time.

A block of the MMDiT computes products (projections), attention, and between them much that costs little but memory:
norms, modulation, rotation, activations, often in float32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from osjax.models.mmdit import Remat

# Products over so few channels, such as those with a LoRA, are computed again: what they give is as large as any.
FEW_CHANNELS = 128


def keeps_attention(operation: Any, *_: Any, **__: Any) -> bool:
    """A policy of `jax.checkpoint`: what cuDNN's attention computed is kept."""
    return operation.name.startswith("dot_product_attention_fwd")


def keeps_products(operation: Any, *operands: Any, **options: Any) -> bool:
    """A policy of `jax.checkpoint`: attention and what the projections give are kept."""
    if operation.name != "dot_general":
        return keeps_attention(operation)
    (contracted, _), (batched, _) = options["dimension_numbers"]
    return not batched and operands[0].shape[contracted[0]] > FEW_CHANNELS


# `run.remat` → what the MMDiT takes. All but the first keep attention, `elementwise` the products too.
POLICIES: Mapping[str, Remat] = {
    "blocks": True,
    "products": keeps_attention,
    "elementwise": keeps_products,
    "nothing": False,
}
