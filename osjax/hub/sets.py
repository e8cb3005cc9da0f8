"""Which files of which repositories make a model that osjax converts."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import PurePosixPath

from osjax.errors import OsjaxError

_OPEN_SORA = "hpcai-tech/Open-Sora-v2"  # holds FLUX.1-dev and both text encoders too
_TEXT_ENCODERS = ("google/t5-v1_1-xxl/*", "openai/clip-vit-large-patch14/*")

_PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_PICKLES += tuple(f"{ending}.index.json" for ending in _PICKLES)
_USEFUL = (".safetensors", *_PICKLES, ".json", "spiece.model", "merges.txt")  # weights, configs, tokenizers


@dataclasses.dataclass(frozen=True)
class Part:
    """Files of one repository, by shell patterns. They keep their paths, which are those that upstream reads."""

    repo: str
    patterns: tuple[str, ...] = ("*",)

    def choose(self, paths: Iterable[str]) -> list[str]:
        """Those of a repository's paths that are needed: pickles only in folders without safetensors.

        Raises OsjaxError if a pattern fits none.
        """
        useful = [path for path in paths if path.endswith(_USEFUL)]
        absent = [pattern for pattern in self.patterns if not any(fnmatchcase(path, pattern) for path in useful)]
        if absent:
            raise OsjaxError(f"{self.repo} holds no {', '.join(absent)}: check the repository and --revision")
        wanted = [path for path in useful if any(fnmatchcase(path, pattern) for pattern in self.patterns)]
        safe = {PurePosixPath(path).parent for path in wanted if path.endswith(".safetensors")}
        return [path for path in wanted if not (path.endswith(_PICKLES) and PurePosixPath(path).parent in safe)]


# Each is enough to generate: text encoders that are there already are not downloaded twice.
SETS = {
    "open-sora-v2": (Part(_OPEN_SORA, ("Open_Sora_v2.safetensors", "hunyuan_vae.safetensors", *_TEXT_ENCODERS)),),
    "open-sora-v2-dc-ae": (
        Part(
            "hpcai-tech/Open-Sora-v2-Video-DC-AE",
            ("Open_Sora_v2_Video_DC_AE.safetensors", "F32T4C128_AE.safetensors"),
        ),
        Part(_OPEN_SORA, _TEXT_ENCODERS),
    ),
    "flux1-dev": (Part(_OPEN_SORA, ("flux1-dev.safetensors", "flux1-dev-ae.safetensors", *_TEXT_ENCODERS)),),
}


def parts_of(name: str) -> tuple[Part, ...]:
    """What `name` stands for: one of SETS, or all that is useful of a repository OWNER/NAME. Raises OsjaxError."""
    if name in SETS:
        return SETS[name]
    owner, _, rest = name.partition("/")
    if not owner or not rest or "/" in rest or ".." in name or not all(c.isalnum() or c in "-._/" for c in name):
        raise OsjaxError(f"there is no model {name}: choose {', '.join(SETS)}, or a repository OWNER/NAME")
    return (Part(name),)
