"""Captions into a step: as token ids where encoders run with the step, or encoded already; and text dropout.

B captions, L tokens, P pooled-text width.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from osjax.bundle import Component
from osjax.residency import model_config
from osjax.sampling.latents import Text
from osjax.text.tokenize import Tokenizer, load_tokenizer


class TokenIds(NamedTuple):
    """Token ids int32 [B, L] for each text encoder."""

    t5_bl: Any
    clip_bl: Any


Prompts = TokenIds | Text


def load_tokenizers(components: Mapping[str, Component]) -> dict[str, Tokenizer]:
    """The tokenizers of the text encoders among the components, whose tokenizers are full paths."""
    return {
        name: load_tokenizer(
            Path(component.tokenizer), component.max_length, vocab_size=model_config(component).vocab_size
        )
        for name, component in components.items()
        if component.tokenizer is not None
    }


def tokenized(tokenizers: Mapping[str, Tokenizer], texts: Sequence[str]) -> TokenIds:
    """Token ids of texts for T5 and CLIP."""
    return TokenIds(*(tokenizers[name].encode(texts)[0] for name in ("t5", "clip")))


def drop(prompts: Prompts, empty: Prompts, key: jax.Array, t5_chance: float, clip_chance: float) -> Prompts:
    """The prompts, of which either half is that of the empty prompt (`empty`, of one row) with its chance, each by
    itself."""
    batch = prompts[0].shape[0]
    chances = zip(jax.random.split(key), (t5_chance, clip_chance), strict=True)
    dropped = (jax.random.bernoulli(one, chance, (batch,)) for one, chance in chances)
    return type(prompts)(
        *(
            jnp.where(gone_b.reshape(-1, *(1,) * (given.ndim - 1)), none, given)
            for gone_b, given, none in zip(dropped, prompts, empty, strict=True)
        )
    )


def embed(modules: Mapping[str, Any], prompts: Prompts) -> Text:
    """Encoded prompts; token ids go through the encoders."""
    if isinstance(prompts, Text):
        return prompts
    return Text(modules["t5"](prompts.t5_bl), modules["clip"](prompts.clip_bl)[1])
