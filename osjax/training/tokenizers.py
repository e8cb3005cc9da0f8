"""Tokenizers for new text encoders: byte-level BPE, trained on the captions of the shapes.

Byte level, so that any prompt has tokens. Special tokens have the ids that the released tokenizers give them: T5 pads
with 0 and ends with 1; CLIP starts with the last id but one, and ends and pads with the last, where it pools.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing

from osjax.errors import OsjaxError
from osjax.files import make_folder, replacing
from osjax.text.annotate import annotate
from osjax.training.captions import corpus

CAPTIONS = 4_000
BYTES = 256


def train_tokenizer(kind: str, vocab_size: int, folder: Path) -> None:
    """Writes tokenizer.json and tokenizer_config.json into `folder`: at most `vocab_size` tokens, lower case.

    kind: t5 or clip. Raises OsjaxError for a vocabulary that cannot hold all bytes.
    """
    first, last, roles, template = TRAINERS[kind]
    if vocab_size < BYTES + len(first) + len(last):
        raise OsjaxError(f"vocab_size {vocab_size} of the new {kind} does not hold all bytes: give at least 300")
    pieces = _pieces(vocab_size - len(first) - len(last))
    ids = {token: index for index, token in enumerate([*first, *pieces[0], *last])}
    tokenizer = _byte_level(models.BPE(vocab=ids, merges=pieces[1]))
    tokenizer.add_special_tokens([*first, *last])
    special = [(token, ids[token]) for token in (*first, *last) if token in template]
    tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=special)
    make_folder(folder)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **roles}
    for name, content in (
        ("tokenizer.json", tokenizer.to_str()),
        ("tokenizer_config.json", json.dumps(config, indent=2)),
    ):
        with replacing(folder / name) as temporary:
            temporary.write_text(content + "\n", encoding="utf-8")


# Kind → tokens before and behind the learned ones, their roles, and what a text is wrapped in.
TRAINERS = {
    "t5": (("<pad>", "</s>"), (), {"pad_token": "<pad>", "eos_token": "</s>"}, "$A </s>"),
    "clip": (
        (),
        ("<|startoftext|>", "<|endoftext|>"),
        {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
        "<|startoftext|> $A <|endoftext|>",
    ),
}


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
