"""How a video came to be: written inside it and beside it, and read back.

One result is three files of one stem: `.txt` (the prompt as the model saw it), `.json` (everything), and the video
`.mp4` or, for a single frame, `.png`. All three are first written in full under temporary names; then they are renamed,
the video last. So a video under its final name means a result that is finished and whole, whenever the process died.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from osjax.errors import OsjaxError
from osjax.files import digest, replacing
from osjax.media.write import encode_mp4, encode_png, probe


@dataclasses.dataclass(frozen=True)
class Reference:
    """A reference file: its name without folders, and the SHA-256 of its bytes."""

    name: str
    sha256: str

    @classmethod
    def of(cls, path: str | os.PathLike[str]) -> Reference:
        """Describes a file. Raises OsjaxError if it cannot be read."""
        return cls(Path(path).name, digest(path))


@dataclasses.dataclass(frozen=True)
class UsedLoRA:
    """A LoRA: the name of its folder, the weight it had, and the SHA-256 of its content."""

    name: str
    weight: float
    sha256: str


@dataclasses.dataclass(frozen=True)
class Provenance:
    """Everything needed to draw a video again, and what drawing it took.

    prompt, prompt_used: as the user gave it, and with refinement, frame rate and motion score added.
    guidance: the options of classifier-free guidance by name; request: every option of the request by name.
    seconds: wall time by stage; mesh: devices by axis; device: their kind, as JAX names it.
    bundle, bundle_sha256: the model's label and the digest of its description; loras: what was merged into it.
    attention: the implementation chosen; batch_size, batch_index: how many were drawn together, and its place among
    them: the last bits depend on the shapes of the arrays.
    forward_passes: of the transformer, those computed in full.
    precision: of the transformer's blocks, full or in 8 bits; approximate: whether these or attention are in 8 bits, or
    forward passes were cut short (the request's `speed`), so that this is near the exact video.
    xla_flags: what the compiler was told beyond its defaults, without values that are places on a disk; compiled_kept:
    whether programs were kept from run to run, so that `seconds` may hold no compiling.
    in_blocks: whether the transformer's blocks came to the devices one by one, which may change last bits.
    frames_sha256: of the uint8 frames before encoding ([T, H, W, 3], row-major); equal digests are equal pictures.
    """

    prompt: str
    prompt_used: str
    negative_prompt: str
    seed: int
    height: int
    width: int
    num_frames: int
    fps: float
    steps: int
    guidance: Mapping[str, Any]
    cond_type: str
    refs: tuple[Reference, ...]
    forward_passes: int
    seconds: Mapping[str, float]
    bundle: str
    bundle_sha256: str
    osjax_version: str
    jax_version: str
    device: str
    mesh: Mapping[str, int]
    dtype: str
    attention: str
    batch_size: int
    batch_index: int
    request: Mapping[str, Any]
    loras: tuple[UsedLoRA, ...] = ()
    precision: str = "full"
    approximate: bool = False
    xla_flags: str = ""
    compiled_kept: bool = False
    in_blocks: bool = False
    frames_sha256: str = ""

    def to_json(self) -> str:
        """As indented JSON, other alphabets left readable."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False, indent=2)

    @classmethod
    def from_json(cls, text: str) -> Provenance:
        """The inverse of `to_json` (tuples inside mappings come back as lists). Raises ValueError for other text."""
        values = json.loads(text)
        try:
            refs = tuple(Reference(**ref) for ref in values.pop("refs"))
            loras = tuple(UsedLoRA(**each) for each in values.pop("loras", ()))
            return cls(**values, refs=refs, loras=loras)
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError("not the fields of a provenance") from error


def write_outputs(stem: str | os.PathLike[str], frames: Iterable[np.ndarray], provenance: Provenance) -> list[Path]:
    """Writes a result and returns its files, the video (or image) first.

    stem: path of the files without their endings; the folder is made if missing, an older result of the stem replaced.
    frames: uint8 [T, H, W, 3] or an iterator of [H, W, 3], drawn while encoding; their digest becomes `frames_sha256`.
    Raises OsjaxError for what the disk refuses, ValueError if there are not `provenance.num_frames` frames, and what
    the iterator raises; no file of the stem has changed then.
    """
    video = result_path(stem, provenance.num_frames)
    record, prompt = _with_ending(stem, ".json"), _with_ending(stem, ".txt")
    hasher = hashlib.sha256()

    def described() -> str:
        return dataclasses.replace(provenance, frames_sha256=hasher.hexdigest()).to_json()

    counted = _exactly(provenance.num_frames, frames, hasher.update)
    # The blocks end from the innermost out: the video takes its name last.
    with replacing(video) as new_video, replacing(record) as new_record, replacing(prompt) as new_prompt:
        if provenance.num_frames == 1:
            (frame,) = counted
            encode_png(new_video, frame, described())
        else:
            encode_mp4(new_video, counted, provenance.fps, described)
        new_record.write_text(described() + "\n", encoding="utf-8")
        new_prompt.write_text(provenance.prompt_used, encoding="utf-8")
    return [video, record, prompt]


def result_path(stem: str | os.PathLike[str], num_frames: int) -> Path:
    """The video of a stem, or the image if it has one frame: the file that `write_outputs` finishes with."""
    return _with_ending(stem, ".png" if num_frames == 1 else ".mp4")


def is_finished(stem: str | os.PathLike[str], num_frames: int) -> bool:
    """Whether `write_outputs` has finished for that stem and number of frames."""
    return result_path(stem, num_frames).is_file()


def read(path: str | os.PathLike[str]) -> Provenance:
    """Reads the provenance inside an .mp4 or .png, or in a .json. Raises OsjaxError if there is none."""
    try:
        text = Path(path).read_text(encoding="utf-8") if Path(path).suffix == ".json" else probe(path).comment
        return Provenance.from_json(text)
    except FileNotFoundError as error:
        raise OsjaxError(f"no such file: {path}: check the path") from error
    except (OSError, ValueError) as error:
        raise OsjaxError(f"{path} holds no provenance that can be read here: give a file that osjax wrote") from error


def _exactly(count: int, frames: Iterable[np.ndarray], see: Callable[[np.ndarray], None]) -> Iterator[np.ndarray]:
    """Passes the frames through, each shown to `see`. Raises ValueError at the end if they are not `count`."""
    found = 0
    for frame in frames:
        frame = np.ascontiguousarray(frame)
        see(frame)
        found += 1
        yield frame
    if found != count:
        raise ValueError(f"{found} frames where {count} are announced")


def _with_ending(stem: str | os.PathLike[str], ending: str) -> Path:
    return Path(os.fspath(stem) + ending)  # with_suffix would cut a name that holds a dot
