"""The tiny tokenizers stay inside their vocabulary for any prompt, and give back what they know."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from convert.tiny_tokenizers import write_clip, write_t5
from osjax.text.tokenize import load_tokenizer

WRITERS = {"t5": write_t5, "clip": write_clip}
UNKNOWN = {"t5": 2, "clip": 0}
SIZE, LENGTH = 64, 20


@pytest.fixture(scope="module", params=WRITERS)
def tiny(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / request.param
    WRITERS[request.param](folder, SIZE)
    return request.param, load_tokenizer(folder, LENGTH, vocab_size=SIZE)


def test_size_and_special_ids(tiny):
    kind, tokenizer = tiny
    backend = tokenizer.backend
    assert len(backend) == SIZE
    assert sorted(backend.get_vocab().values()) == list(range(SIZE))
    specials = (backend.bos_token_id, backend.eos_token_id, backend.pad_token_id, backend.unk_token_id)
    assert specials == {"t5": (None, 1, 0, 2), "clip": (62, 63, 63, 0)}[kind]


@given(text=st.text(max_size=40))
def test_any_prompt_stays_in_the_vocabulary(tiny, text):
    ids, _ = tiny[1].encode([text])
    assert ids.shape == (1, LENGTH)
    assert ids.min() >= 0
    assert ids.max() < SIZE


@given(text=st.text(alphabet="abcxyzABC 0189.,!?'-", max_size=LENGTH - 2))
def test_known_characters_come_back_in_lower_case(tiny, text):
    ids, truncated = tiny[1].encode([text])
    assert truncated == [False]
    assert tiny[1].backend.decode(ids[0], skip_special_tokens=True) == text.lower()


def test_unknown_characters_share_one_id(tiny):
    kind, tokenizer = tiny
    ids, _ = tokenizer.encode(["日ß🎬"])
    assert ids[0].tolist().count(UNKNOWN[kind]) == 3


@pytest.mark.parametrize("write", WRITERS.values())
@pytest.mark.parametrize("size", [3, 73])
def test_impossible_sizes(write, size, tmp_path):
    with pytest.raises(ValueError, match="characters, not"):
        write(tmp_path, size)
