"""One question to a server on loopback, through the real client: answers, refusals, silence and junk."""

import asyncio
import socket
import sys

import pytest

from osjax.errors import OsjaxError
from osjax.refine import server
from osjax.refine.server import ServerError, Settings, ask, check, connect
from tests.osjax.refine.chat_server import KEY, Reply, refused, said, serving

QUICK = Settings(model="m", timeout_s=5, retries=2)
MESSAGES = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
JSON = {"content-type": "application/json"}


def put(monkeypatch, url, settings=QUICK):
    """The answer to one question."""
    monkeypatch.setenv("OPENAI_BASE_URL", url)

    async def once():
        async with connect(settings) as client:
            return await ask(client, MESSAGES, settings)

    return asyncio.run(once())


def failure(reply, monkeypatch, settings=QUICK):
    """The error that a question ends with if every reply is `reply`, and how many questions came in."""
    with serving(lambda _: reply) as chat, pytest.raises(ServerError) as raised:
        put(monkeypatch, chat.url, settings)
    line = str(raised.value)
    assert "\n" not in line
    assert KEY not in line
    assert ": " in line, "what is wrong: what to do"
    return raised.value, len(chat.questions)


def test_an_answer(monkeypatch):
    with serving(lambda _: said("  a long prompt\n")) as chat:
        assert put(monkeypatch, chat.url) == "a long prompt"
    (question,) = chat.questions
    assert (question.model, question.instruction, question.content) == ("m", "s", "u")
    assert question.authorization == f"Bearer {KEY}"


@pytest.mark.parametrize("status", [429, 500, 503])
def test_what_is_refused_for_the_moment_is_asked_again(status, monkeypatch):
    replies = iter([refused(status), refused(status), said("at last")])
    with serving(lambda _: next(replies)) as chat:
        assert put(monkeypatch, chat.url) == "at last"
    assert len(chat.questions) == 3


@pytest.mark.parametrize(
    ("status", "asked", "lasting", "remedy"),
    [
        (400, 1, False, "takes such a request"),
        (401, 1, True, "check OPENAI_API_KEY"),
        (403, 1, True, "may use 'm'"),
        (404, 1, True, "check OPENAI_BASE_URL"),
        (413, 1, False, "a smaller reference image"),
        (418, 1, True, "try again later"),
        (429, 3, True, "lower --refine.at_once"),
        (500, 3, True, "try again later"),
    ],
)
def test_a_refusal_is_one_line_with_its_status(status, asked, lasting, remedy, monkeypatch):
    error, count = failure(refused(status), monkeypatch)
    assert f"127.0.0.1 refuses with status {status}: " in str(error)
    assert remedy in str(error)
    assert (count, error.lasting) == (asked, lasting)


@pytest.mark.parametrize("stall", ["before_headers", "after_headers"])
def test_silence(stall, monkeypatch):
    patience = Settings(model="m", timeout_s=0.2, retries=0)
    error, count = failure(Reply(b"{}", headers=JSON, stall=stall), monkeypatch, patience)
    assert "is silent for 0.2 s: raise --refine.timeout_s" in str(error)
    assert (count, error.lasting) == (1, True)


def test_nobody_there(monkeypatch):
    with socket.socket() as taken:  # bound, but not listening
        taken.bind(("127.0.0.1", 0))
        url = f"http://user:{KEY}@127.0.0.1:{taken.getsockname()[1]}/v1"
        with pytest.raises(ServerError, match=r"127\.0\.0\.1 cannot be reached: check OPENAI_BASE_URL") as raised:
            put(monkeypatch, url, Settings(retries=0))
    assert raised.value.lasting
    assert KEY not in str(raised.value)


@pytest.mark.parametrize(
    "reply",
    [
        Reply(b"<html>welcome</html>", headers={"content-type": "text/html"}),
        Reply(b"{nope", headers=JSON),
        Reply(b"[1, 2]", headers=JSON),
        Reply(b"null", headers=JSON),
        Reply(b"{}", headers=JSON),
        Reply(b"", headers=JSON),
        Reply(b'{"choices": []}', headers=JSON),
        Reply(b'{"choices": [{}]}', headers=JSON),
        Reply(b'{"choices": ["a"]}', headers=JSON),
        Reply(b'{"choices": {"a": 1}}', headers=JSON),
        Reply(b'{"choices": [{"message": {"content": 5}}]}', headers=JSON),
        Reply(b'{"choices": [{"message": {"content": "\xff"}}]}', headers=JSON),
        said("half a letter: \ud800"),
        said(None),
    ],
    ids=lambda reply: repr(reply.body[-40:]),
)
def test_junk(reply, monkeypatch):
    error, count = failure(reply, monkeypatch)
    assert "'m' at 127.0.0.1 sends no answer in text: check OPENAI_BASE_URL and --refine.model" in str(error)
    assert (count, error.lasting) == (1, False)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("OPENAI_API_KEY", "", "set OPENAI_API_KEY"),
        ("OPENAI_API_KEY", f"{KEY}\n", "OPENAI_API_KEY holds spaces"),
        ("OPENAI_API_KEY", f"{KEY} {KEY}", "OPENAI_API_KEY holds spaces"),
        ("OPENAI_API_KEY", f"{KEY}ü", "OPENAI_API_KEY holds spaces"),
        ("OPENAI_BASE_URL", "localhost:8000", "OPENAI_BASE_URL is no address"),
        ("OPENAI_BASE_URL", f"ftp://u:{KEY}@host", "OPENAI_BASE_URL is no address"),
        ("OPENAI_BASE_URL", f"http://u:{KEY}@host:99999", "OPENAI_BASE_URL is no address"),
        ("OPENAI_BASE_URL", f"http://[{KEY}", "OPENAI_BASE_URL is no address"),
    ],
)
def test_an_environment_that_names_no_server(name, value, message, monkeypatch):
    monkeypatch.setenv(name, value)
    with pytest.raises(OsjaxError, match=message) as raised:
        check(QUICK)
    assert KEY not in str(raised.value)


def test_an_empty_address_is_the_usual_one(monkeypatch):
    monkeypatch.setenv("OPENAI_BASE_URL", "")
    assert str(connect(QUICK).base_url).rstrip("/") == server.DEFAULT_URL


def test_without_the_client(monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)  # as if it were not installed
    with pytest.raises(OsjaxError, match=r"pip install 'osjax\[refine\]'"):
        check(QUICK)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": " "}, "--refine.model is empty"),
        ({"timeout_s": 0.0}, "--refine.timeout_s is 0"),
        ({"timeout_s": float("nan")}, "--refine.timeout_s is nan"),
        ({"retries": -1}, "--refine.retries is -1"),
        ({"at_once": 0}, "--refine.at_once is 0"),
    ],
)
def test_settings_that_make_no_sense(options, message):
    with pytest.raises(OsjaxError, match=message):
        Settings(**options)
