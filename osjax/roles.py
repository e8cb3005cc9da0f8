"""Which components of a bundle draw, and what of a request they are told."""

from __future__ import annotations

import dataclasses

from osjax.request import Request
from osjax.sampling.guidance import Guidance
from osjax.sampling.latents import SamplingOptions
from osjax.text.annotate import annotate


@dataclasses.dataclass(frozen=True)
class Roles:
    """Components by what they do. told_motion: whether prompts tell the model the frame rate and the motion score."""

    mmdit: str = "mmdit"
    vae: str = "vae"
    told_motion: bool = True

    @property
    def components(self) -> tuple[str, ...]:
        """All that are needed, the text encoders first."""
        return "t5", "clip", self.vae, self.mmdit


VIDEO = Roles()
IMAGE = Roles("image_mmdit", "image_vae", told_motion=False)  # FLUX


def prompt_used(request: Request, roles: Roles) -> str:
    """The prompt as the model is to see it: refined, and for a video with frame rate and motion score."""
    prompt = request.refined_prompt or request.prompt
    if not roles.told_motion:
        return prompt
    return annotate(prompt, request.fps, request.dynamic_score or request.motion_score)


def sampling_options(request: Request) -> SamplingOptions:
    """The part of a request that the sampler reads."""
    scales = Guidance(
        text=request.guidance,
        image=request.guidance_img,
        text_osci=request.text_osci,
        image_osci=request.image_osci,
        scale_temporal_osci=request.scale_temporal_osci,
    )
    return SamplingOptions(request.num_steps, scales, request.shift, request.flow_shift, request.speed)
