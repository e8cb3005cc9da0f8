"""What the model was trained to read behind a prompt: a full stop, the frame rate and the motion score.

Order and wording are those of the captions of the training data; see section 7 of the specification. Only prompts are
annotated: negative prompts stay as they are.
"""

from __future__ import annotations

import re

_FPS_AT_END = re.compile(r"\d+ FPS\.$")


def with_period(text: str) -> str:
    """`text` without surrounding white space, ending with a full stop; other end marks are kept before it."""
    text = text.strip()
    return text if text.endswith(".") else text + "."


def has_fps(text: str) -> bool:
    """Whether `text` ends with a frame rate, such as `24 FPS.`"""
    return _FPS_AT_END.search(text) is not None


def with_fps(text: str, fps: int) -> str:
    """`text` as a sentence, followed by the frame rate in frames a second unless it ends with one already."""
    text = with_period(text)
    return text if has_fps(text) else f"{text} {fps} FPS."


def with_motion_score(text: str, score: int | str) -> str:
    """`text` followed by the motion score, upstream's measure of how much moves (4 is its default)."""
    return f"{text} {score} motion score."


def annotate(prompt: str, fps: int, motion_score: int | str) -> str:
    """The prompt as the text encoders get it: `a cat` at 24 fps and score 4 is `a cat. 24 FPS. 4 motion score.`"""
    return with_motion_score(with_fps(prompt, fps), motion_score)
