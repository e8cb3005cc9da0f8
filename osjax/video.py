"""What the pipeline gives: frames, and how they came to be."""

from __future__ import annotations

import base64
import dataclasses
import os
import tempfile
from pathlib import Path

import numpy as np

from osjax import provenance


@dataclasses.dataclass(frozen=True)
class Video:
    """frames: uint8 [T, H, W, 3]; fps: frames a second; provenance: how it came to be."""

    frames: np.ndarray
    fps: float
    provenance: provenance.Provenance

    def save(self, stem: str | os.PathLike[str]) -> list[Path]:
        """Writes `stem`.mp4 (.png for one frame), .json and .txt, each whole or not at all; returns their paths."""
        return provenance.write_outputs(stem, self.frames, self.provenance)

    def _repr_html_(self) -> str:
        """The video itself, where a notebook shows this object."""
        with tempfile.TemporaryDirectory() as folder:
            path = self.save(Path(folder) / "video")[0]
            data = base64.b64encode(path.read_bytes()).decode()
        if len(self.frames) == 1:
            return f'<img src="data:image/png;base64,{data}">'
        return f'<video src="data:video/mp4;base64,{data}" controls autoplay loop muted playsinline></video>'
