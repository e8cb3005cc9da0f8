"""Tokenizers for new text encoders: byte-level BPE, trained on the captions of the shapes.

Byte level, so that any prompt has tokens. Special tokens are in `osjax/text/save.py`.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from osjax.errors import OsjaxError
from osjax.text.annotate import annotate
from osjax.text.save import SPECIAL, save_tokenizer
from osjax.training.captions import corpus

CAPTIONS = 4_000
BYTES = 256


def train_tokenizer(kind: str, vocab_size: int, folder: Path) -> None:
    """Writes a tokenizer into `folder`: at most `vocab_size` tokens, lower case.

    kind: t5 or clip. Raises OsjaxError for a vocabulary that cannot hold all bytes, and for what the disk refuses.
    """
    special = SPECIAL[kind]
    learned = vocab_size - len(special.first) - len(special.last)
    if learned < BYTES:
        raise OsjaxError(f"vocab_size {vocab_size} of the new {kind} does not hold all bytes: give at least 300")
    pieces, merges = _pieces(learned)
    ids = {token: index for index, token in enumerate([*special.first, *pieces, *special.last])}
    save_tokenizer(folder, _byte_level(models.BPE(vocab=ids, merges=merges)), special)


def _byte_level(model: models.BPE) -> Tokenizer:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _pieces(count: int) -> tuple[list[str], list[tuple[str, str]]]:
    """At most `count` tokens in the order of their ids, all bytes first, and the merges that make them."""
    tokenizer = _byte_level(models.BPE())
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=count, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(_texts(), trainer)
    model = json.loads(tokenizer.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    return sorted(model["vocab"], key=model["vocab"].get), merges


@functools.cache  # it takes seconds, and a run makes two tokenizers
def _texts() -> tuple[str, ...]:
    """Captions as the encoders get them, with every motion score."""
    return tuple(annotate(text, 24, 1 + index % 7) for index, text in enumerate(corpus(CAPTIONS, seed=0)))
