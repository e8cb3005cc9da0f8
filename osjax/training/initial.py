"""Weights to start from when there is no checkpoint.

The modules draw their own (LeCun normal); this file changes what would keep a transformer from learning well: blocks
start as the identity, and logits of attention start small; and what would keep an autoencoder from it: noise.
"""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp

from osjax import leaves
from osjax.models.rngs import ModuleRngs
from osjax.residency import MODELS

# Log-variance that the posterior starts with. At 0, its noise is as large as all that the latents hold at first.
_FIRST_LOG_VARIANCE = -6.0
# Modulation and output start at zero: adaLN-Zero (Peebles & Xie 2023, section 3.2).
_ZERO_IN_MMDIT = re.compile(r"(.*\.mod\.lin|final_layer\.linear)\.(kernel|bias)")


def initialise(kind: str, config: Any, key: jax.Array) -> dict[str, jax.Array]:
    """Leaf name → float32 array, for a new model of that kind."""
    model_class, _ = MODELS[kind]
    arrays = leaves.flatten(model_class(config, rngs=ModuleRngs(key), dtype=jnp.float32))
    if kind == "mmdit":
        return {
            leaf: jnp.zeros_like(array) if _ZERO_IN_MMDIT.fullmatch(leaf) else array for leaf, array in arrays.items()
        }
    if kind == "hunyuan_vae":
        log_variance = slice(config.latent_channels, None)
        bias = arrays["encoder.quant_conv.bias"].at[log_variance].set(_FIRST_LOG_VARIANCE)
        return arrays | {"encoder.quant_conv.bias": bias}
    if kind == "t5":
        # T5 does not scale q·k: its queries are drawn smaller instead (Raffel et al. 2020, in their code's defaults).
        return arrays | {"blocks.q.kernel": arrays["blocks.q.kernel"] * config.d_kv**-0.5}
    return arrays
