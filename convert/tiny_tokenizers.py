"""Character-level tokenizers for the tiny text encoders, in the place of T5's SentencePiece and CLIP's byte pairs.

Text is lower-cased and every character is a token; characters outside the vocabulary share one unknown token. Special
tokens are those of the real tokenizers (`osjax/text/save.py`).
"""

from __future__ import annotations

import string
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, normalizers

from osjax.text.save import SPECIAL, Special, save_tokenizer

# Most useful first: a smaller vocabulary takes a shorter piece.
_ALPHABET = " " + string.ascii_lowercase + string.digits + string.punctuation

_UNKNOWN = "<unk>"


def write_t5(folder: Path, vocab_size: int) -> None:
    """Writes tokenizer.json and tokenizer_config.json: ids 0 pad, 1 end, 2 unknown, then characters.

    Raises ValueError if `vocab_size` leaves no character, or more than there are in printable ASCII.
    """
    special = SPECIAL["t5"]
    _write(folder, [*special.first, _UNKNOWN, *_characters(vocab_size - 3)], special)


def write_clip(folder: Path, vocab_size: int) -> None:
    """Writes tokenizer.json and tokenizer_config.json: id 0 unknown, then characters, then start, then end and pad.

    Raises ValueError if `vocab_size` leaves no character, or more than there are in printable ASCII.
    """
    special = SPECIAL["clip"]
    _write(folder, [_UNKNOWN, *_characters(vocab_size - 3), *special.last], special)


def _characters(count: int) -> str:
    if not 0 < count <= len(_ALPHABET):
        raise ValueError(f"a character vocabulary has 1 to {len(_ALPHABET)} characters, not {count}")
    return _ALPHABET[:count]


def _write(folder: Path, tokens: list[str], special: Special) -> None:
    """`tokens` in the order of their ids."""
    # Byte-pair encoding without a single merge leaves characters.
    ids = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=[], unk_token=_UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.decoder = decoders.Fuse()
    save_tokenizer(folder, tokenizer, special, unknown=_UNKNOWN)
