"""Character-level tokenizers for the tiny text encoders, in the place of T5's SentencePiece and CLIP's byte pairs.

Text is lower-cased and every character is a token; characters outside the vocabulary share one unknown token. Special
tokens have the ids that the real tokenizers give them: T5 pads with 0 and ends with 1, CLIP starts with the last id but
one and both ends and pads with the last.
"""

from __future__ import annotations

import json
import string
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers
from tokenizers.processors import TemplateProcessing

# Most useful first: a smaller vocabulary takes a shorter piece.
_ALPHABET = " " + string.ascii_lowercase + string.digits + string.punctuation

_UNKNOWN = "<unk>"


def write_t5(folder: Path, vocab_size: int) -> None:
    """Writes tokenizer.json and tokenizer_config.json: ids 0 pad, 1 end, 2 unknown, then characters.

    Raises ValueError if `vocab_size` leaves no character, or more than there are in printable ASCII.
    """
    pad, end = "<pad>", "</s>"
    tokens = [pad, end, _UNKNOWN, *_characters(vocab_size - 3)]
    _write(folder, tokens, f"$A {end}", {"pad_token": pad, "eos_token": end, "unk_token": _UNKNOWN})


def write_clip(folder: Path, vocab_size: int) -> None:
    """Writes tokenizer.json and tokenizer_config.json: id 0 unknown, then characters, then start, then end and pad.

    Raises ValueError if `vocab_size` leaves no character, or more than there are in printable ASCII.
    """
    start, end = "<|startoftext|>", "<|endoftext|>"
    tokens = [_UNKNOWN, *_characters(vocab_size - 3), start, end]
    roles = {"bos_token": start, "eos_token": end, "pad_token": end, "unk_token": _UNKNOWN}
    _write(folder, tokens, f"{start} $A {end}", roles)


def _characters(count: int) -> str:
    if not 0 < count <= len(_ALPHABET):
        raise ValueError(f"a character vocabulary has 1 to {len(_ALPHABET)} characters, not {count}")
    return _ALPHABET[:count]


def _write(folder: Path, tokens: list[str], template: str, roles: dict[str, str]) -> None:
    """`tokens` in the order of their ids; `template` wraps a text; `roles` names the special tokens."""
    ids = {token: index for index, token in enumerate(tokens)}
    # Byte-pair encoding without a single merge leaves characters.
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[], unk_token=_UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.decoder = decoders.Fuse()
    special = [token for token in tokens if token in roles.values()]
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = TemplateProcessing(
        single=template, special_tokens=[(token, ids[token]) for token in special if token in template]
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **roles}
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
