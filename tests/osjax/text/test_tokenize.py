"""Tokenizers from each of the file sets that text encoders are published with, and what is said about broken ones."""

import json
import subprocess
import sys

import numpy as np
import pytest
import sentencepiece
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from convert.tiny_tokenizers import write_clip, write_t5
from osjax.errors import OsjaxError
from osjax.text.tokenize import load_tokenizer

CORPUS = [
    "a cat sits on the mat",
    "the quick brown fox jumps over the lazy dog",
    "rain falls on the sea at night, 24 FPS.",
] * 20


@pytest.fixture(scope="module")
def t5_folder(tmp_path_factory):
    """A folder with a spiece.model and the special ids of T5's."""
    folder = tmp_path_factory.mktemp("t5")
    model = folder / "spiece.model"
    with model.open("wb") as writer:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CORPUS),
            model_writer=writer,
            vocab_size=42,
            hard_vocab_limit=False,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            minloglevel=2,
        )
    return folder


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A folder with vocab.json and merges.txt, byte pairs as in CLIP: `</w>` ends a word, specials come last."""
    folder = tmp_path_factory.mktemp("clip")
    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Whitespace(), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    trained.train_from_iterator((line.lower() for line in CORPUS), trainer)
    trained.model.save(str(folder))
    vocab = json.loads((folder / "vocab.json").read_text())
    for token in ("<|startoftext|>", "<|endoftext|>"):
        vocab[token] = len(vocab)
    (folder / "vocab.json").write_text(json.dumps(vocab))
    return folder


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    write_t5(folder / "t5", 64)
    write_clip(folder / "clip", 64)
    return folder


@pytest.mark.parametrize("text", ["a cat", "  Two  spaces ", "ﬁne ①é", "quick—brown", "日本", ""])
def test_t5_equals_sentencepiece(t5_folder, text):
    model = sentencepiece.SentencePieceProcessor(model_file=str(t5_folder / "spiece.model"))
    ids = [*model.encode(text), 1]
    encoded, truncated = load_tokenizer(t5_folder, 32).encode([text])
    assert encoded.dtype == np.int32
    assert encoded.tolist() == [ids + [0] * (32 - len(ids))]
    assert truncated == [False]


def test_clip_wraps_words_of_byte_pairs(clip_folder):
    vocab = json.loads((clip_folder / "vocab.json").read_text())
    start, end = len(vocab) - 2, len(vocab) - 1
    ids, _ = load_tokenizer(clip_folder, 10, vocab_size=len(vocab)).encode(["The  CAT\n sits"])
    words = [vocab[word] for word in ("the</w>", "cat</w>", "sits</w>")]
    assert ids.tolist() == [[start, *words, *[end] * 6]]


@pytest.mark.parametrize("name", ["t5_folder", "clip_folder"])
def test_tokenizer_json_gives_the_same_ids(name, request, tmp_path):
    tokenizer = load_tokenizer(request.getfixturevalue(name), 16)
    tokenizer.backend.save_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").is_file()
    expected, _ = tokenizer.encode(CORPUS[:3])
    found, _ = load_tokenizer(tmp_path, 16).encode(CORPUS[:3])
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(("kind", "start", "end", "pad"), [("t5", [], 1, 0), ("clip", [62], 63, 63)])
def test_long_prompts_are_cut_and_reported(tiny, kind, start, end, pad):
    tokenizer = load_tokenizer(tiny / kind, 12)
    room = 12 - len(start) - 1
    ids, truncated = tokenizer.encode(["a" * room, "a" * 300, "a" * (room + 1), ""])
    a = tokenizer.backend.convert_tokens_to_ids("a")
    full = [*start, *[a] * room, end]
    assert ids.tolist() == [full, full, full, [*start, end, *[pad] * (11 - len(start))]]
    assert truncated == [False, True, True, False]


@pytest.mark.parametrize(
    ("image_tokens", "multiple", "length"), [(0, 1, 12), (0, 8, 16), (4, 8, 12), (5, 8, 19), (3, 5, 12)]
)
def test_joint_length_divides(tiny, image_tokens, multiple, length):
    tokenizer = load_tokenizer(tiny / "t5", 12)
    plain, _ = tokenizer.encode(["a cat"])
    ids, _ = tokenizer.encode(["a cat"], image_tokens=image_tokens, pad_to_multiple=multiple)
    assert ids.shape == (1, length)
    np.testing.assert_array_equal(ids[:, :12], plain)
    assert (ids[:, 12:] == 0).all()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no tokenizer in .*: copy tokenizer.json or spiece.model or vocab.json\\+merges.txt"),
        ({"vocab.json": "{}"}, "no tokenizer in"),
        ({"tokenizer.json": "{"}, "cannot read tokenizer.json in .*: copy"),
        ({"tokenizer.json": "{}"}, "cannot read tokenizer.json in .*: copy"),
        ({"spiece.model": "junk"}, "cannot read spiece.model in .*: copy"),
        ({"vocab.json": "{", "merges.txt": ""}, "cannot read vocab.json\\+merges.txt in .*: copy"),
    ],
)
def test_missing_and_broken_files(tmp_path, files, message):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(OsjaxError, match=message) as caught:
        load_tokenizer(tmp_path, 12)
    assert "\n" not in str(caught.value)


def test_a_tokenizer_without_pad_token(tiny, tmp_path):
    (tmp_path / "tokenizer.json").write_text((tiny / "t5" / "tokenizer.json").read_text())
    with pytest.raises(OsjaxError, match=r"no pad token: add pad_token to its tokenizer_config\.json"):
        load_tokenizer(tmp_path, 12)


def test_a_tokenizer_of_another_encoder(tiny):
    with pytest.raises(OsjaxError, match="64 entries but its encoder 63: "):
        load_tokenizer(tiny / "t5", 12, vocab_size=63)


def test_text_that_is_not_unicode(tiny):
    with pytest.raises(OsjaxError, match="not valid Unicode: "):
        load_tokenizer(tiny / "t5", 12).encode(["fine", "\udcff"])


def test_transformers_is_imported_late():
    code = "import sys, osjax.text.tokenize; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
