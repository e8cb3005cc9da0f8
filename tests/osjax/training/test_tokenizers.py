"""Tokenizers for new text encoders: any text, few tokens, the released ones' special ids."""

import hashlib
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from osjax.errors import OsjaxError
from osjax.text.annotate import annotate
from osjax.text.save import SPECIAL
from osjax.text.tokenize import load_tokenizer
from osjax.training.captions import corpus
from osjax.training.tokenizers import train_tokenizer

VOCABULARY = 512
KINDS = tuple(SPECIAL)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers")
    for kind in KINDS:
        train_tokenizer(kind, VOCABULARY, folder / kind)
    return {kind: folder / kind for kind in KINDS}


@pytest.fixture(scope="module")
def tokenizers(folders):
    return {kind: load_tokenizer(folders[kind], 48, vocab_size=VOCABULARY) for kind in KINDS}


def lowered(text):
    """Letter by letter, as the tokenizers do it."""
    return "".join(letter.lower() for letter in text)


@pytest.mark.parametrize("kind", KINDS)
@given(text=st.text(st.characters(exclude_categories=["Cs", "Cn"]), max_size=30))
@settings(deadline=None, max_examples=100)
def test_any_text_comes_back_in_lower_case(tokenizers, kind, text):
    backend = tokenizers[kind].backend
    ids = backend(text)["input_ids"]
    assert max(ids) < VOCABULARY
    assert backend.decode(ids, skip_special_tokens=True).removeprefix(" ") == lowered(text).removeprefix(" ")


@pytest.mark.parametrize("text", ["", " ", "日本語 👩‍👩‍👧", "\0\x1f", "ÀÉ" + unicodedata.normalize("NFD", "é")])
def test_texts_of_other_worlds(tokenizers, text):
    for tokenizer in tokenizers.values():
        ids = tokenizer.backend(text)["input_ids"]
        assert tokenizer.backend.decode(ids, skip_special_tokens=True).strip() == lowered(text).strip()


@pytest.mark.parametrize("vocab_size", [258, 300, 400])
@pytest.mark.parametrize("kind", KINDS)
def test_the_vocabulary_is_as_large_as_asked_for(tmp_path, kind, vocab_size):
    train_tokenizer(kind, vocab_size, tmp_path)
    assert len(load_tokenizer(tmp_path, 48, vocab_size=vocab_size).backend) == vocab_size


def test_t5_ends_with_1_and_pads_with_0(tokenizers):
    ids_bl, cut = tokenizers["t5"].encode(["a red circle", ""])
    assert ids_bl.shape == (2, 48)
    assert cut == [False, False]
    (end,) = np.flatnonzero(ids_bl[0] == 1)
    assert (ids_bl[0, :end] > 1).all()
    assert not ids_bl[0, end + 1 :].any()
    assert ids_bl[1].tolist() == [1] + [0] * 47


def test_clip_starts_with_the_last_but_one_and_ends_and_pads_with_the_last(tokenizers):
    ids_bl, _ = tokenizers["clip"].encode(["a red circle", ""])
    first, last = VOCABULARY - 2, VOCABULARY - 1
    assert ids_bl[0, 0] == first
    # CLIP pools at the highest id, the first of them if there are several.
    end = int(ids_bl[0].argmax())
    assert (ids_bl[0, 1:end] < first).all()
    assert (ids_bl[0, end:] == last).all()
    assert ids_bl[1].tolist() == [first] + [last] * 47


@pytest.mark.parametrize("kind", KINDS)
def test_captions_take_few_tokens(tokenizers, kind):
    """About one a word, so that 48 hold any caption of the shapes."""
    texts = [annotate(text, 24, 4) for text in corpus(500, seed=1)]
    _, cut = tokenizers[kind].encode(texts)
    assert not any(cut)
    lengths = [len(tokenizers[kind].backend(text)["input_ids"]) for text in texts]
    assert np.mean([length / len(text.split()) for length, text in zip(lengths, texts, strict=True)]) < 2


def test_case_is_not_told_apart(tokenizers):
    for tokenizer in tokenizers.values():
        upper_bl, lower_bl = tokenizer.encode(["A RED Circle"])[0], tokenizer.encode(["a red circle"])[0]
        np.testing.assert_array_equal(upper_bl, lower_bl)


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_call_writes_the_same_files(folders, tmp_path, kind):
    """A run that is resumed makes its tokenizers again."""
    train_tokenizer(kind, VOCABULARY, tmp_path)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        again, first = ((place / name).read_bytes() for place in (tmp_path, folders[kind]))
        assert hashlib.sha256(again).digest() == hashlib.sha256(first).digest()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tokenizer.json", "tokenizer_config.json"]


@pytest.mark.parametrize("kind", KINDS)
def test_a_vocabulary_too_small_for_all_bytes(tmp_path, kind):
    with pytest.raises(OsjaxError, match=f"vocab_size 257 of the new {kind} does not hold all bytes: give at least"):
        train_tokenizer(kind, 257, tmp_path / "new")
    assert not (tmp_path / "new").exists()
