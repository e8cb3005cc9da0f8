"""Questions to an OpenAI-compatible server: messages in, text out, every failure one line.

What the server itself says of a failure is never repeated: it may hold the key.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from osjax.errors import OsjaxError

if TYPE_CHECKING:
    import openai

DEFAULT_URL = "https://api.openai.com/v1"

# What to do about an HTTP status; `{model}` stands for the model asked.
_REMEDIES = {
    400: "check that {model!r} takes such a request, images among them",
    401: "check OPENAI_API_KEY",
    403: "check that the key of OPENAI_API_KEY may use {model!r}",
    404: "check OPENAI_BASE_URL, which often ends with /v1, and that --refine.model {model!r} is served there",
    413: "give a smaller reference image or a shorter prompt",
    422: "check that {model!r} takes such a request, images among them",
    429: "wait, top up the account, or lower --refine.at_once",
}
_THIS_QUESTION_ONLY = frozenset({400, 413, 422})


class ServerError(OsjaxError):
    """No answer that can be used. lasting: the next question would fare no better."""

    def __init__(self, line: str, *, lasting: bool = False) -> None:
        super().__init__(line)
        self.lasting = lasting


@dataclasses.dataclass(frozen=True)
class Settings:
    """Whom to ask and how patiently.

    strict: stop at the first failure; timeout_s: seconds that the server may be silent; retries: of a question that was
    refused for the moment (429, 5xx, no connection, silence), at growing intervals; at_once: questions under way.
    Raises OsjaxError for values that make no sense.
    """

    model: str = "gpt-4o"
    strict: bool = False
    timeout_s: float = 60.0
    retries: int = 3
    at_once: int = 4

    def __post_init__(self) -> None:
        if not self.model.strip():
            raise OsjaxError("--refine.model is empty: name a model of the server")
        if not (self.timeout_s > 0 and math.isfinite(self.timeout_s)):
            raise OsjaxError(f"--refine.timeout_s is {self.timeout_s}: give a number of seconds above 0")
        if self.retries < 0:
            raise OsjaxError(f"--refine.retries is {self.retries}: give 0 or more")
        if self.at_once < 1:
            raise OsjaxError(f"--refine.at_once is {self.at_once}: give at least 1")


def check(settings: Settings) -> None:
    """Raises OsjaxError if no server can be asked: the client is not installed, or the environment names no server."""
    connect(settings)


def connect(settings: Settings) -> openai.AsyncOpenAI:
    """The client for the server that the environment names; nothing is sent yet. Raises OsjaxError as `check` does."""
    try:
        import openai  # not above: an extra, and slow to import
    except ImportError as error:
        raise OsjaxError("refining prompts needs the openai client: pip install 'osjax[refine]'") from error
    key = os.environ.get("OPENAI_API_KEY", "")
    if not key:
        raise OsjaxError("no key for refining prompts: set OPENAI_API_KEY (to any word, if the server asks for none)")
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise OsjaxError("OPENAI_API_KEY holds spaces or letters that no key has: set it to the key alone")
    url = os.environ.get("OPENAI_BASE_URL") or DEFAULT_URL
    _check_url(url)
    return openai.AsyncOpenAI(api_key=key, base_url=url, timeout=settings.timeout_s, max_retries=settings.retries)


async def ask(client: openai.AsyncOpenAI, messages: Sequence[dict[str, Any]], settings: Settings) -> str:
    """The text of the server's answer, without white space around it. Raises ServerError."""
    import openai

    try:
        answer = await client.chat.completions.create(model=settings.model, messages=list(messages))
        text = answer.choices[0].message.content.strip()
        text.encode()  # JSON can spell halves of letters, which no file takes
        return text
    except openai.OpenAIError as error:
        raise _explained(error, client, settings) from error
    except (ValueError, TypeError, AttributeError, LookupError) as error:  # the client checks no types
        place = f"{settings.model!r} at {client.base_url.host}"
        raise ServerError(f"{place} sends no answer in text: check OPENAI_BASE_URL and --refine.model") from error


def _explained(error: openai.OpenAIError, client: openai.AsyncOpenAI, settings: Settings) -> ServerError:
    import openai

    server = f"the server {client.base_url.host}"
    if isinstance(error, openai.APITimeoutError):
        line = f"{server} is silent for {settings.timeout_s:g} s: raise --refine.timeout_s, or ask another server"
        return ServerError(line, lasting=True)
    if isinstance(error, openai.APIStatusError):
        status = error.status_code
        remedy = _REMEDIES.get(status, "try again later").format(model=settings.model)
        return ServerError(
            f"{server} refuses with status {status}: {remedy}", lasting=status not in _THIS_QUESTION_ONLY
        )
    return ServerError(f"{server} cannot be reached: check OPENAI_BASE_URL and the network", lasting=True)


def _check_url(url: str) -> None:
    """Raises OsjaxError without the address, which may hold a password."""
    try:
        parts = urlsplit(url)
        sound = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        sound = False
    if not sound:
        raise OsjaxError("OPENAI_BASE_URL is no address of a server: set it to one such as http://localhost:8000/v1")
