"""What is asked for: one video, every option of it, checked once at the border."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping
from typing import Any

from osjax.errors import OsjaxError

MAX_FRAMES = 129
MAX_SEED = 2**32 - 1  # JAX keys with 32-bit integers; a larger seed would silently equal a smaller one
ADVICE = frozenset({"refined_prompt", "dynamic_score", "refined_by"})  # options that a language model fills in
EXACT = "exact"
SPEEDS = (EXACT, "balanced", "fast")  # those of `osjax.sampling.caching.SPEEDS`
SINGULAR = frozenset({"prompt", "negative_prompt", "refs", "seed", "motion_score", *ADVICE})  # see `shared`


@dataclasses.dataclass(frozen=True)
class Request:
    """One video (or image, with one frame). The defaults are those of upstream's 256px configuration.

    refs: paths of reference images (i2v kinds) or clips (v2v kinds), as many as `cond_type` needs.
    resolution and aspect_ratio choose the size; if resolution is None, height and width in pixels do.
    num_frames: of what is drawn at once; extend: how often the video is then continued from its last frames (33, or 32
    of an autoencoder that is not causal), each time by as many as num_frames has more.
    guidance, guidance_img: classifier-free scales for the text and the reference; fps: of the file and in the prompt.
    motion_score: a number told to the model, from "1" for little motion to "7" for much.
    refined_prompt, dynamic_score: what the language model `refined_by` made of the prompt, told to the video's model in
    place of prompt and motion_score.
    speed: exact, or approximate, and then balanced or fast: most forward passes are cut short.
    seed: of the noise, and of the posterior sample if `sample_posterior` is set (else references take its mode).
    Raises OsjaxError, naming the option and what it accepts, for a value that cannot be drawn.
    """

    prompt: str
    negative_prompt: str = ""
    refs: tuple[str, ...] = ()
    cond_type: str = "t2v"
    resolution: str | None = "256px"
    aspect_ratio: str | None = "16:9"
    height: int | None = None
    width: int | None = None
    num_frames: int = MAX_FRAMES
    extend: int = 0
    num_steps: int = 50
    guidance: float = 7.5
    guidance_img: float = 3.0
    text_osci: bool = True
    image_osci: bool = True
    scale_temporal_osci: bool = True
    shift: bool = True
    flow_shift: float | None = None
    speed: str = EXACT
    seed: int = 0
    fps: int = 24
    motion_score: str = "4"
    sample_posterior: bool = False
    refined_prompt: str | None = None
    dynamic_score: str | None = None
    refined_by: str | None = None

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Request:
        """A request from options by name. Raises OsjaxError for a name that is none, and as the class does."""
        unknown = sorted(set(options) - {field.name for field in dataclasses.fields(cls)})
        if unknown:
            raise OsjaxError(f"a request has no option {', '.join(unknown)}: osjax/request.py lists those it has")
        return cls(**options)

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise OsjaxError("the prompt is empty: describe the video with --prompt")
        for name in ("guidance", "guidance_img", "flow_shift"):
            value = getattr(self, name)
            if value is not None and not math.isfinite(value):
                raise OsjaxError(f"{name} is {value}: give a finite number")
        if self.flow_shift is not None and self.flow_shift <= 0:
            raise OsjaxError(f"flow_shift is {self.flow_shift}: give a number above 0")
        if not 0 <= self.seed <= MAX_SEED:
            raise OsjaxError(f"seed is {self.seed}: give a whole number from 0 to {MAX_SEED}")
        if not 1 <= self.num_frames <= MAX_FRAMES or self.num_frames % 4 > 1:  # the model says which of the two
            raise OsjaxError(
                f"num_frames is {self.num_frames}: give 4k+1 frames from 1 to {MAX_FRAMES}, 4k for high compression"
            )
        if self.extend < 0:
            raise OsjaxError(f"extend is {self.extend}: give how often the video is continued, 0 for not at all")
        if self.speed not in SPEEDS:
            raise OsjaxError(f"speed is {self.speed!r}: use exact, or for an approximation balanced or fast")
        if self.num_steps < 1:
            raise OsjaxError(f"num_steps is {self.num_steps}: give at least 1")
        if not 1 <= self.fps <= 240:
            raise OsjaxError(f"fps is {self.fps}: give a whole number from 1 to 240")
        for name in ("motion_score", "dynamic_score"):
            score = getattr(self, name)
            if score is not None and not re.fullmatch(r"\d+(\.\d+)?", score):
                raise OsjaxError(f"{name} is {score!r}: give a number such as 4")
        if self.resolution is None and (self.height is None or self.width is None):
            raise OsjaxError("no size: give a resolution with an aspect_ratio, or both height and width")
        if self.resolution is not None and self.aspect_ratio is None:
            raise OsjaxError("a resolution alone gives no size: add an aspect_ratio such as 16:9")

    def shared(self) -> tuple[Any, ...]:
        """What must be equal among requests that are drawn together: all that decides shapes, schedule and guidance."""
        names = [field.name for field in dataclasses.fields(self) if field.name not in SINGULAR]
        return tuple(getattr(self, name) for name in names)

    def recorded(self) -> dict[str, Any]:
        """Every option by name, as a file that holds them in JSON gives them back."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


def continuation_seed(seed: int, number: int) -> int:
    """The seed of a video's continuation `number`, from 1: the first four bytes of SHA-256 of "SEED/NUMBER".

    Neither the video's own noise comes again, nor that of its next sample, whose seed is one more.
    """
    return int.from_bytes(hashlib.sha256(f"{seed}/{number}".encode()).digest()[:4], "big")
