"""Many prompts, several at once, to a language model and back: what it makes of each, or why it makes nothing of it."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import dataclasses
import io
import re
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

from PIL import Image

from osjax.media import read_reference, to_uint8
from osjax.refine import server
from osjax.refine.instructions import REWRITE, SCORE, Kind
from osjax.refine.server import ServerError, Settings

T = TypeVar("T")

LONGEST = 4000  # characters; the text encoder reads some 2000, and a longer answer is no prompt


@dataclasses.dataclass(frozen=True)
class Still:
    """A frame of a reference, cut to the video's size: an image, or of a clip the first frame, or the last `from_end`.

    height, width: in pixels.
    """

    path: str
    height: int
    width: int
    from_end: bool = False


@dataclasses.dataclass(frozen=True)
class Draft:
    """A prompt as its user wrote it, what is drawn from it, and the frames that are given."""

    prompt: str
    kind: Kind
    stills: tuple[Still, ...] = ()


@dataclasses.dataclass(frozen=True)
class Wanted:
    """What is asked for: the prompt written anew, a motion score (of the new prompt, if there is one), or both."""

    prompt: bool
    score: bool


@dataclasses.dataclass(frozen=True)
class Advice:
    """What came of a draft. None: not asked for, or asked in vain; then `troubles` has a line for it."""

    prompt: str | None = None
    score: str | None = None
    troubles: tuple[str, ...] = ()


async def advise(
    drafts: Sequence[Draft], wanted: Wanted, settings: Settings, on_done: Callable[[], object] = lambda: None
) -> list[Advice]:
    """Asks the server for each draft, `settings.at_once` at a time; `on_done` is called after each.

    After a failure that lasts, such as a refused key, nothing more is asked. Raises OsjaxError for a reference that
    cannot be read, and as `server.check` does; if `settings.strict`, ServerError for the first answer that fails.
    """
    slots = asyncio.Semaphore(settings.at_once)
    lasting: list[ServerError] = []

    async def attempt(write: Callable[[T], list[dict[str, Any]]], about: T, read: Callable[[str], str]) -> str:
        if lasting:
            raise lasting[0]
        try:
            return read(await server.ask(client, write(about), settings))
        except ServerError as error:
            if error.lasting:
                lasting.append(error)
            raise

    async def one(draft: Draft) -> Advice:
        prompt, score, troubles = None, None, []
        async with slots:
            with _noting(troubles, "the prompt stays as it is", settings.strict):
                prompt = await attempt(_rewriting, draft, read_prompt) if wanted.prompt else None
            with _noting(troubles, "the motion score stays at its default", settings.strict):
                score = await attempt(_scoring, prompt or draft.prompt, read_score) if wanted.score else None
        on_done()
        return Advice(prompt, score, tuple(troubles))

    async with server.connect(settings) as client:
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(draft)) for draft in drafts]
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None  # the others were stopped because of it
    return [task.result() for task in tasks]


def read_prompt(answer: str) -> str:
    """The prompt in an answer, on one line, without quotation marks around it. Raises ServerError if there is none."""
    prompt = " ".join(answer.split())
    quoted = re.fullmatch(r'["“]([^"“”]*)["”]', prompt)
    prompt = quoted[1].strip() if quoted else prompt
    if not any(character.isalnum() for character in prompt):
        raise ServerError("the answer holds no prompt: try again, or another --refine.model")
    if len(prompt) > LONGEST:
        raise ServerError(f"the answer is {len(prompt)} characters long: try again, or another --refine.model")
    return prompt


def read_score(answer: str) -> str:
    """The score in an answer: its only number, whole and from 1 to 7. Raises ServerError if there is none."""
    numbers = re.findall(r"[-+]?\d+(?:[.,]\d+)?", answer)
    if len(numbers) != 1 or not re.fullmatch("[1-7]", numbers[0]):
        raise ServerError("the answer holds no score from 1 to 7: try again, or another --refine.model")
    return numbers[0]


@contextlib.contextmanager
def _noting(troubles: list[str], consequence: str, strict: bool) -> Iterator[None]:
    """Turns a ServerError into a line of `troubles`, unless `strict`."""
    try:
        yield
    except ServerError as error:
        if strict:
            raise
        troubles.append(f"{error}; {consequence}")


def _rewriting(draft: Draft) -> list[dict[str, Any]]:
    content: list[dict[str, Any]] = [{"type": "text", "text": draft.prompt}]
    content += [{"type": "image_url", "image_url": {"url": _data_url(still)}} for still in draft.stills]
    # Servers of models that see nothing often take only a string.
    return _messages(REWRITE[draft.kind], content if draft.stills else draft.prompt)


def _scoring(prompt: str) -> list[dict[str, Any]]:
    return _messages(SCORE, prompt)


def _messages(instruction: str, content: str | list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"role": "system", "content": instruction}, {"role": "user", "content": content}]


def _data_url(still: Still) -> str:
    """The frame as a JPEG inside an address. Raises OsjaxError if it cannot be read."""
    (x_hwc,) = read_reference(still.path, 1, still.height, still.width, from_end=still.from_end)
    file = io.BytesIO()
    Image.fromarray(to_uint8(x_hwc)).save(file, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")
