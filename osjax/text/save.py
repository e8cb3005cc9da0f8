"""Tokenizers that are made here, as files that transformers reads.

Special tokens are those of the released tokenizers, so that encoders of ours pool and pad alike.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from osjax.files import make_folder, replacing


@dataclasses.dataclass(frozen=True)
class Special:
    """Special tokens of a kind of encoder. first, last: those with the lowest and highest ids, in order; roles: as
    transformers calls them; template: what a text is wrapped in, `$A` being the text."""

    first: tuple[str, ...]
    last: tuple[str, ...]
    roles: Mapping[str, str]
    template: str


# T5 pads with 0 and ends with 1. CLIP starts with the last id but one; it ends and pads with the last, where it pools.
SPECIAL = {
    "t5": Special(("<pad>", "</s>"), (), {"pad_token": "<pad>", "eos_token": "</s>"}, "$A </s>"),
    "clip": Special(
        (),
        ("<|startoftext|>", "<|endoftext|>"),
        {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>", "pad_token": "<|endoftext|>"},
        "<|startoftext|> $A <|endoftext|>",
    ),
}


def save_tokenizer(folder: Path, tokenizer: Tokenizer, special: Special, unknown: str | None = None) -> None:
    """Writes tokenizer.json and tokenizer_config.json into `folder`, each whole or not at all.

    tokenizer: its vocabulary holds the special tokens, and the one for what is `unknown`, if there is one. It is given
    the template. Raises OsjaxError for what the disk refuses.
    """
    roles = dict(special.roles) | ({"unk_token": unknown} if unknown else {})
    tokenizer.add_special_tokens(list(dict.fromkeys(roles.values())))
    wrapped = [token for token in (*special.first, *special.last) if token in special.template]
    tokenizer.post_processor = TemplateProcessing(
        single=special.template, special_tokens=[(token, tokenizer.token_to_id(token)) for token in wrapped]
    )
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False, **roles}
    make_folder(folder)
    for name, content in (
        ("tokenizer.json", tokenizer.to_str(pretty=True)),
        ("tokenizer_config.json", json.dumps(config, indent=2)),
    ):
        with replacing(folder / name) as temporary:
            temporary.write_text(content + "\n", encoding="utf-8")
