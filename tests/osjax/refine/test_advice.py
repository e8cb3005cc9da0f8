"""Many prompts at once to a server on loopback: what is sent of each kind, what is made of the answers and failures."""

import asyncio
import base64
import io
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from osjax.errors import OsjaxError
from osjax.refine import Advice, Draft, Kind, ServerError, Settings, Still, Wanted, advise
from osjax.refine.advice import LONGEST, read_prompt, read_score
from osjax.refine.instructions import REWRITE, SCORE
from tests.osjax.refine.chat_server import KEY, refused, said, serving

BOTH = Wanted(prompt=True, score=True)
PROMPT = Wanted(prompt=True, score=False)
CAT = Draft("a cat", Kind.T2V)


def advice_of(monkeypatch, answer, drafts, wanted=BOTH, **settings):
    """What comes of drafts, and the server that was asked."""
    with serving(answer) as chat:
        monkeypatch.setenv("OPENAI_BASE_URL", chat.url)
        return asyncio.run(advise(drafts, wanted, Settings(**{"timeout_s": 5, "retries": 1} | settings))), chat


def helpful(question):
    if question.is_score:
        return said("6" if "long" in question.content else "2")
    return said(f"a long caption of {question.content}")


def test_prompts_and_the_scores_of_the_new_ones(monkeypatch):
    drafts = [CAT, Draft("a dog", Kind.T2I)]
    advice, chat = advice_of(monkeypatch, helpful, drafts)
    assert advice == [Advice("a long caption of a cat", "6"), Advice("a long caption of a dog", "6")]
    assert {(question.instruction, question.content) for question in chat.questions} == {
        (REWRITE[Kind.T2V], "a cat"),
        (REWRITE[Kind.T2I], "a dog"),
        (SCORE, "a long caption of a cat"),
        (SCORE, "a long caption of a dog"),
    }


def test_only_what_is_wanted_is_asked_for(monkeypatch):
    advice, chat = advice_of(monkeypatch, helpful, [CAT], PROMPT)
    assert (advice, len(chat.questions)) == ([Advice(prompt="a long caption of a cat")], 1)
    advice, chat = advice_of(monkeypatch, helpful, [CAT], Wanted(prompt=False, score=True))
    assert (advice, len(chat.questions)) == ([Advice(score="2")], 1)


def test_the_image_goes_along_cut_to_the_video(monkeypatch, tmp_path):
    picture = np.zeros((40, 120, 3), np.uint8)
    picture[:, 40:80] = (250, 120, 10)  # what a square video sees of it
    Image.fromarray(picture).save(tmp_path / "a.png")
    draft = Draft("it jumps", Kind.I2V, (Still(str(tmp_path / "a.png"), 32, 32),))
    _, chat = advice_of(monkeypatch, lambda _: said("a caption"), [draft], PROMPT)
    (question,) = chat.questions
    assert question.instruction == REWRITE[Kind.I2V]
    text, image = question.content
    assert (text["type"], text["text"], image["type"]) == ("text", "it jumps", "image_url")
    head, _, body = image["image_url"]["url"].partition(",")
    assert head == "data:image/jpeg;base64"
    seen = np.asarray(Image.open(io.BytesIO(base64.b64decode(body, validate=True)))).astype(int)
    assert seen.shape == (32, 32, 3)
    assert np.abs(seen[:, 4:-4] - (250, 120, 10)).max() <= 8  # bicubic blurs the edges, JPEG rounds


def test_an_image_that_cannot_be_read_is_the_users_mistake(monkeypatch):
    drafts = [Draft("it jumps", Kind.I2V, (Still("missing.png", 32, 32),))]
    with pytest.raises(OsjaxError, match=r"no such reference image: missing\.png"):
        advice_of(monkeypatch, helpful, drafts)


def test_several_at_once_but_not_all(monkeypatch):
    def slow(question):
        time.sleep(0.05)
        return helpful(question)

    done = []
    with serving(slow) as chat:
        monkeypatch.setenv("OPENAI_BASE_URL", chat.url)
        drafts = [Draft(f"prompt {index}", Kind.T2V) for index in range(9)]
        advice = asyncio.run(advise(drafts, PROMPT, Settings(at_once=3), on_done=lambda: done.append(1)))
    assert [each.prompt for each in advice] == [f"a long caption of prompt {index}" for index in range(9)]
    assert chat.most_at_once == 3
    assert len(done) == 9


def test_one_prompt_fails_by_itself(monkeypatch):
    def answer(question):
        return refused(400) if question.content == "a dog" and not question.is_score else helpful(question)

    advice, _ = advice_of(monkeypatch, answer, [CAT, Draft("a dog", Kind.T2V), Draft("rain", Kind.T2V)])
    assert [(each.prompt is None, each.score) for each in advice] == [(False, "6"), (True, "2"), (False, "6")]
    (line,) = advice[1].troubles
    assert line.startswith("the server 127.0.0.1 refuses with status 400: ")
    assert line.endswith("; the prompt stays as it is")


def test_junk_in_place_of_a_score(monkeypatch):
    advice, _ = advice_of(monkeypatch, lambda q: said("very much!") if q.is_score else helpful(q), [CAT])
    assert advice[0].prompt == "a long caption of a cat"
    assert advice[0].score is None
    assert "no score from 1 to 7: " in advice[0].troubles[0]
    assert advice[0].troubles[0].endswith("; the motion score stays at its default")


def test_after_a_refused_key_nothing_more_is_asked(monkeypatch):
    drafts = [Draft(f"prompt {index}", Kind.T2V) for index in range(50)]
    advice, chat = advice_of(monkeypatch, lambda _: refused(401), drafts, at_once=2)
    assert len(chat.questions) <= 2
    assert all(each.prompt is None and each.score is None and len(each.troubles) == 2 for each in advice)
    assert not [line for each in advice for line in each.troubles if KEY in line or "\n" in line]


@pytest.mark.parametrize("answer", [lambda _: refused(401), lambda _: said(""), lambda _: said("…")])
def test_strict_stops_at_the_first_failure(answer, monkeypatch):
    asked = []

    def answer_counted(question):
        asked.append(question)
        return answer(question)

    drafts = [Draft(f"prompt {index}", Kind.T2V) for index in range(50)]
    with pytest.raises(ServerError):
        advice_of(monkeypatch, answer_counted, drafts, strict=True, at_once=2)
    assert 1 <= len(asked) <= 4, "those under way at the failure, and at most one more each"


@pytest.mark.parametrize(
    ("answer", "prompt"),
    [
        ("a cat\n  sits.\n\nIt\tpurrs.", "a cat sits. It purrs."),
        ('"A cat sits."', "A cat sits."),
        ("“A cat sits.”", "A cat sits."),
        ('"One" sign and "two"', '"One" sign and "two"'),
        ("ein Kätzchen 🐈", "ein Kätzchen 🐈"),
    ],
)
def test_a_prompt_is_read(answer, prompt):
    assert read_prompt(answer) == prompt


@pytest.mark.parametrize("answer", ["", "...", '""', "\0", "a" * (LONGEST + 1)])
def test_what_is_no_prompt(answer):
    with pytest.raises(ServerError, match=": try again"):
        read_prompt(answer)


@given(st.text())
def test_any_answer_is_a_prompt_on_one_line_or_refused(answer):
    try:
        prompt = read_prompt(answer)
    except ServerError:
        return
    assert prompt.strip()
    assert len(prompt.splitlines()) == 1


@given(st.integers(-20, 20))
def test_scores_are_whole_and_from_1_to_7(number):
    for answer in (f"{number}", f"Motion score: {number}.", f"**{number}**"):
        if 1 <= number <= 7:
            assert read_score(answer) == str(number)
        else:
            with pytest.raises(ServerError, match="no score"):
                read_score(answer)


@pytest.mark.parametrize("answer", ["", "four", "3 or 4", "5/7", "4.5", "4,5", "44", "٤", "-3"])
def test_what_is_no_score(answer):
    with pytest.raises(ServerError, match="no score"):
        read_score(answer)


def test_every_kind_has_an_instruction_of_its_own():
    assert set(REWRITE) == set(Kind)
    assert len(set(REWRITE.values())) == len(Kind)
