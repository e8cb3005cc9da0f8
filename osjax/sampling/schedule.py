"""The noise levels s of the Euler steps, from 1 (noise) to 0 (data), and the shift that training draws with too.

Shift by resolution: Esser et al. 2024, "Scaling Rectified Flow Transformers", section 5.3.2; the line through
(256 tokens, 1) and (4096 tokens, 3) and the factor sqrt(t) for t latent frames are Open-Sora's.
"""

from __future__ import annotations

import math
from typing import TypeVar

import jax
import numpy as np

Levels = TypeVar("Levels", float, np.ndarray, jax.Array)

_FEW_TOKENS, _FEW_SHIFT = 256, 1.0
_MANY_TOKENS, _MANY_SHIFT = 4096, 3.0


def shift_alpha(tokens_per_frame: int, latent_frames: int) -> float:
    """How strongly a video of that size is shifted: linear in the tokens of one frame, times sqrt(latent frames)."""
    slope = (_MANY_SHIFT - _FEW_SHIFT) / (_MANY_TOKENS - _FEW_TOKENS)
    return (_FEW_SHIFT + slope * (tokens_per_frame - _FEW_TOKENS)) * math.sqrt(latent_frames)


def time_shift(alpha: float, s: Levels) -> Levels:
    """α·s / (1 + (α − 1)·s): keeps 0 and 1, and for α > 1 moves what lies between towards 1, the noisy end."""
    return alpha * s / (1 + (alpha - 1) * s)


def timesteps(
    steps: int,
    tokens_per_frame: int,
    latent_frames: int,
    *,
    shift: bool = True,
    flow_shift: float | None = None,
) -> np.ndarray:
    """Noise levels float32 [steps + 1], falling from exactly 1 to exactly 0; step i goes from level i to level i + 1.

    flow_shift replaces the α of the video's size; shift=False is the uniform schedule, whatever flow_shift says.
    """
    levels = np.linspace(1.0, 0.0, steps + 1)  # float64: the reference's own float32 rounding is within 2e-7 of it
    if shift:
        alpha = shift_alpha(tokens_per_frame, latent_frames) if flow_shift is None else flow_shift
        levels = time_shift(alpha, levels)
    return levels.astype(np.float32)
