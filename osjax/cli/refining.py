"""`--refine_prompt True` and `--motion_score dynamic`: a language model is asked before the first video is drawn."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict
from tqdm import tqdm

from osjax.refine import Advice, Draft, Kind, Settings, Still, Wanted, advise, check
from osjax.request import Request

if TYPE_CHECKING:
    from osjax.pipeline import Pipeline

DYNAMIC = "dynamic"  # the motion score that is no number

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Refinement:
    """What is wanted of every prompt, and who is asked."""

    wanted: Wanted
    settings: Settings


def read_refinement(config: ConfigDict) -> Refinement | None:
    """What a configuration asks a language model for, if anything. Raises OsjaxError if none can be asked."""
    wanted = Wanted(prompt=config.refine_prompt, score=config.motion_score == DYNAMIC)
    if not (wanted.prompt or wanted.score):
        return None
    refinement = Refinement(wanted, Settings(**config.refine.to_dict()))
    check(refinement.settings)
    return refinement


def without_score(refinement: Refinement) -> Refinement | None:
    """What is left to ask for pictures, which have no motion."""
    wanted = dataclasses.replace(refinement.wanted, score=False)
    return dataclasses.replace(refinement, wanted=wanted) if wanted.prompt else None


def refine(
    requests: Sequence[Request],
    earlier: Sequence[Mapping[str, Any] | None],
    refinement: Refinement,
    pipeline: Pipeline,
) -> list[Request]:
    """The requests with what the language model makes of them; it is asked once for all that start from the same.

    earlier: for each, the recorded request of the video that lies in its place. If that is the same, its advice is used
    again: an interrupted command is completed with the prompts that it began with. pipeline: whose sizes count.
    What is asked for in vain stays as it is, with a warning, or raises OsjaxError if the refinement is strict.
    """
    drafts = [_draft(request, pipeline) for request in requests]
    known = {
        draft: advice
        for draft, request, found in zip(drafts, requests, earlier, strict=True)
        if found and (advice := _earlier_advice(request, found, refinement))
    }
    unknown = [draft for draft in dict.fromkeys(drafts) if draft not in known]
    known |= zip(unknown, _ask(unknown, refinement, pipeline.progress) if unknown else (), strict=True)
    return [_advised(request, known[draft], refinement) for request, draft in zip(requests, drafts, strict=True)]


def _draft(request: Request, pipeline: Pipeline) -> Draft:
    shape = pipeline.shape(request)
    if shape.grid.t == 1:  # a single frame ignores references
        return Draft(request.prompt, Kind.T2I)
    stills = tuple(Still(path, *shape.size, from_end) for path, from_end in shape.kind.assign(request.refs))
    return Draft(request.prompt, Kind.I2V if stills else Kind.T2V, stills)


def _earlier_advice(request: Request, found: Mapping[str, Any], refinement: Refinement) -> Advice | None:
    """What an earlier run got for the same request from the same model, if it got all that is wanted."""
    advice = Advice(found.get("refined_prompt"), found.get("dynamic_score"))
    return (
        advice if _advised(request, advice, refinement).recorded() == found and _complete(advice, refinement) else None
    )


def _complete(advice: Advice, refinement: Refinement) -> bool:
    return refinement.wanted == Wanted(prompt=advice.prompt is not None, score=advice.score is not None)


def _advised(request: Request, advice: Advice, refinement: Refinement) -> Request:
    by = refinement.settings.model if advice.prompt or advice.score else None
    return dataclasses.replace(request, refined_prompt=advice.prompt, dynamic_score=advice.score, refined_by=by)


def _ask(drafts: Sequence[Draft], refinement: Refinement, progress: bool) -> list[Advice]:
    with tqdm(total=len(drafts), desc="refine", unit="prompt", disable=not progress) as bar:
        advice = asyncio.run(advise(drafts, refinement.wanted, refinement.settings, on_done=bar.update))
    for line, count in collections.Counter(line for each in advice for line in each.troubles).items():
        _log.warning("%s%s", line, f" ({count} of {len(drafts)})" if len(drafts) > 1 else "")
    return advice
