"""Reading Hugging Face's `config.json`: the options that matter, upstream's defaults, and everything else by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from convert.options import fields_of
from osjax.errors import OsjaxError

Config = TypeVar("Config")

# Written by transformers into any model's config.json; none changes what an encoder computes.
_BOOKKEEPING = """
    _attn_implementation_autoset _commit_hash _name_or_path architectures dtype model_type torch_dtype
    transformers_version chunk_size_feed_forward finetuning_task id2label is_decoder is_encoder_decoder label2id
    output_attentions output_hidden_states output_past prefix problem_type return_dict task_specific_params
    tie_encoder_decoder tie_word_embeddings tokenizer_class torchscript use_bfloat16 use_cache tf_legacy_loss
    add_cross_attention cross_attention_hidden_size gradient_checkpointing bos_token_id decoder_start_token_id
    eos_token_id pad_token_id sep_token_id bad_words_ids begin_suppress_tokens diversity_penalty do_sample
    early_stopping encoder_no_repeat_ngram_size exponential_decay_length_penalty forced_bos_token_id
    forced_eos_token_id length_penalty max_length min_length no_repeat_ngram_size num_beam_groups num_beams
    num_return_sequences output_scores remove_invalid_values repetition_penalty return_dict_in_generate
    suppress_tokens temperature top_k top_p typical_p
"""
_UNUSED = frozenset(_BOOKKEEPING.split())


def read(
    options: Mapping[str, Any], config: type[Config], *, defaults: Mapping[str, Any], unused: Iterable[str], model: str
) -> Config:
    """The fields of `config` out of `options`; one that is absent takes upstream's default, then that of `config`.

    `unused` names the model's own options without effect on inference. transformers leaves out of the file whatever
    equals its own default, hence `defaults`, which differ from the published model's. Raises OsjaxError for an unknown
    option and for pruned heads.
    """
    known = fields_of(options, config, unused={*_UNUSED, *unused, "pruned_heads"}, model=model)
    if options.get("pruned_heads"):
        raise OsjaxError(f"{model} has pruned heads, which are not supported: use the full checkpoint")
    return config(**{**defaults, **known})
