"""Prompts to token ids of one fixed length, with the tokenizers that come with the text encoders."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from osjax.errors import OsjaxError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# The files that make a tokenizer, best first, and the class of transformers that reads them.
_READERS = {
    ("tokenizer.json",): "PreTrainedTokenizerFast",
    ("spiece.model",): "T5Tokenizer",
    ("vocab.json", "merges.txt"): "CLIPTokenizer",
}


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """A tokenizer of transformers, and the number of tokens that its encoder is given."""

    backend: PreTrainedTokenizerFast
    max_length: int

    def encode(
        self, texts: Sequence[str], *, image_tokens: int = 0, pad_to_multiple: int = 1
    ) -> tuple[np.ndarray, list[bool]]:
        """One or more texts -> ids int32 [B, L], filled up with the pad token, and for each text whether it was cut.

        L is `max_length`, or the next length for which `image_tokens` + L is a multiple of `pad_to_multiple`. A text
        that is too long loses its last tokens but keeps the one that marks its end. Raises OsjaxError for text that is
        not valid Unicode.
        """
        for text in texts:
            _check_unicode(text)
        encoded = self.backend(
            list(texts),
            max_length=self.max_length,
            padding="max_length",
            truncation=True,
            return_overflowing_tokens=True,
        )
        # What was cut off comes in rows of its own, each behind the row that it was cut from.
        _, first_rows, rows = np.unique(encoded["overflow_to_sample_mapping"], return_index=True, return_counts=True)
        ids_bl = np.asarray(encoded["input_ids"], np.int32)[first_rows]
        missing = -(image_tokens + self.max_length) % pad_to_multiple
        ids_bl = np.pad(ids_bl, ((0, 0), (0, missing)), constant_values=self.backend.pad_token_id)
        return ids_bl, (rows > 1).tolist()


def load_tokenizer(folder: Path, max_length: int, *, vocab_size: int | None = None) -> Tokenizer:
    """The tokenizer in `folder`: a tokenizer.json, T5's spiece.model, or CLIP's vocab.json with merges.txt.

    Uses no network. Raises OsjaxError if the folder holds none of these or they cannot be read, if the tokenizer has no
    pad token, and if it has more entries than `vocab_size`, that of the encoder which it is for.
    """
    folder = Path(folder)
    backend = _read(folder)
    if backend.pad_token_id is None:
        raise OsjaxError(f"the tokenizer in {folder} has no pad token: add pad_token to its tokenizer_config.json")
    if vocab_size is not None and len(backend) > vocab_size:
        raise OsjaxError(
            f"the tokenizer in {folder} has {len(backend)} entries but its encoder {vocab_size}: copy the encoder's own"
        )
    return Tokenizer(backend, max_length)


def _read(folder: Path) -> PreTrainedTokenizerFast:
    found = next((item for item in _READERS.items() if all((folder / name).is_file() for name in item[0])), None)
    if found is None:
        choices = " or ".join("+".join(files) for files in _READERS)
        raise OsjaxError(f"no tokenizer in {folder}: copy {choices} of the text encoder there")
    files, reader = found

    import transformers  # here, since it takes a second or two

    try:
        return getattr(transformers, reader).from_pretrained(folder, local_files_only=True)
    except Exception as error:  # broken files surface as KeyError, ValueError, bare Exception (from Rust), and others
        raise OsjaxError(f"cannot read {'+'.join(files)} in {folder}: copy the tokenizer's files again") from error


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise OsjaxError(f"the prompt {text!r} is not valid Unicode: write it in UTF-8") from error
