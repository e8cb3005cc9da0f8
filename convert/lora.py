"""LoRA files to adapters of osjax, by the table that converts the weights (`convert/mmdit.py`).

What a rule takes from a weight (out, in) it takes from B (out, R) as well: its rows, regrouped and permuted. So one
module of the checkpoint may adapt several projections, each with the same A; and where several modules make up one
projection (q, k and v), their ranks stand side by side, B being zero where a module has no say. Layers that the file
leaves out are zero too.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from convert import layout, mmdit
from convert.peft import Pair, read_adapter
from convert.rules import Place, abstract, exists, find
from osjax import adapters, files, leaves
from osjax.errors import OsjaxError
from osjax.models.lora import Factors, LoRA, factor_shapes
from osjax.models.mmdit import MMDiTConfig
from osjax.models.projections import projections

# Open-Sora v2 and FLUX.1-dev: an adapter is for one of them unless a config says otherwise.
PUBLISHED: tuple[Mapping[str, Any], ...] = (
    {"fused_qkv": False, "use_liger_rope": True, "cond_embed": True, "guidance_embed": False},
    {"fused_qkv": True, "use_liger_rope": False, "cond_embed": False, "guidance_embed": True},
)


@dataclasses.dataclass(frozen=True)
class Job:
    """A LoRA file, converted. base: config of the model that it is for; options_from: what told it."""

    file: Path
    lora: LoRA
    base: MMDiTConfig
    options_from: str
    modules: int

    def describe(self) -> str:
        """One line about it."""
        parameters = sum(array.size for array in self.lora.arrays.values())
        return (
            f"lora: {self.file}, {self.modules} modules onto {len(self.lora.factors)} projections, "
            f"{parameters:,} parameters, options from {self.options_from}"
        )


@dataclasses.dataclass(frozen=True)
class Share:
    """What one module gives to one projection. rows: pieces of scale · B [R, O…], each with its place among outputs."""

    pair: Pair
    rows: tuple[tuple[tuple[int | slice, ...], np.ndarray], ...]

    @property
    def rank(self) -> int:
        return len(self.pair.a)


def prepare(file: Path, config: Path | None = None) -> Job:
    """Reads and converts a LoRA file; writes nothing.

    config: constructor options of the model that it was trained on, by default what lies beside the file, else those
    of the published model that has more of its modules. Raises OsjaxError if the file is no plain LoRA, or does not
    match that model completely.
    """
    pairs = read_adapter(file)
    path = config or layout.find_config(file)
    try:
        sources = [mmdit.read_config(dict(each)) for each in ([layout.read_options(path)] if path else PUBLISHED)]
    except (TypeError, ValueError) as error:
        raise OsjaxError(f"unusable options in {path} ({error}): mend that file") from error
    source = max(sources, key=lambda each: _matches(each, pairs))
    lora = convert(source, pairs)
    return Job(file, lora, source.model, str(path) if path else "the published model", len(pairs))


def write(job: Job, destination: Path) -> None:
    """Writes the adapter as the folder `destination`, which must not exist yet. Raises OsjaxError."""
    metadata = {"source": job.file.name, "source_sha256": files.digest(job.file)}
    adapters.save(destination, job.lora, job.base, metadata)


def convert(source: mmdit.MMDiTSource, pairs: Mapping[str, Pair]) -> LoRA:
    """Pairs by the checkpoint's module names → a float32 adapter of scale 1: the pairs' scales are multiplied into B.

    Raises one OsjaxError that lists all keys that the model has no place for, or whose shapes are not its own.
    """
    model = abstract(mmdit, source, np.float32)
    shares, unknown, misfits = _share_out(source, model, pairs)
    factors: dict[str, Factors] = {}
    for name, rank in _ranks(shares).items():
        shapes = factor_shapes(projections(model)[name], rank)
        factors[name] = Factors(np.zeros(shapes.a, np.float32), np.zeros(shapes.b, np.float32))
    for (name, layer), each in shares.items():
        a, b = factors[name] if layer is None else (factor[layer] for factor in factors[name])
        misfits += _fill(a, b, each)
    if unknown or misfits:
        raise OsjaxError(
            f"LoRA and model do not match (unknown: {', '.join(unknown) or 'none'}; wrong shapes: "
            f"{', '.join(misfits) or 'none'}): give the options of the model that it was trained on with --config FILE"
        )
    return LoRA(factors, 1.0)


def _matches(source: mmdit.MMDiTSource, modules: Iterable[str]) -> int:
    """How many of the modules a checkpoint of that layout has."""
    rules = mmdit.rules(source)
    return sum(find(rules, f"{module}.weight") is not None for module in modules)


def _share_out(
    source: mmdit.MMDiTSource, model: nnx.Module, pairs: Mapping[str, Pair]
) -> tuple[dict[Place, list[Share]], list[str], list[str]]:
    """(projection, layer) → what the modules give to it; keys that the model has no place for; keys of other shapes."""
    rules, targets = mmdit.rules(source), leaves.flatten(model)
    shares: dict[Place, list[Share]] = {}
    unknown, misfits = [], []
    for module, pair in pairs.items():
        rule, places = find(rules, f"{module}.weight") or (None, [])
        if not places or not all(exists(place, targets) and place[0].endswith(".kernel") for place in places):
            unknown += pair.keys
            continue
        try:
            taken = [pair.scale * write.take(pair.b) for write in rule.writes]
        except (TypeError, ValueError, IndexError):
            taken = []
        if sum(rows.size for rows in taken) != pair.b.size:
            misfits.append(f"{pair.keys[1]} of {pair.b.shape}")
            continue
        pieces: dict[Place, list[Any]] = {}
        for (leaf, layer), write, rows in zip(places, rule.writes, taken, strict=True):
            pieces.setdefault((leaf.removesuffix(".kernel"), layer), []).append((write.slot[1:], rows))
        for place, share in pieces.items():
            shares.setdefault(place, []).append(Share(pair, tuple(share)))
    return shares, unknown, misfits


def _ranks(shares: Mapping[Place, Sequence[Share]]) -> dict[str, int]:
    """Projection → the rank that the layer with the most of it needs."""
    ranks: dict[str, int] = {}
    for (name, _), each in shares.items():
        ranks[name] = max(ranks.get(name, 0), sum(share.rank for share in each))
    return ranks


def _fill(a: np.ndarray, b: np.ndarray, shares: Sequence[Share]) -> list[str]:
    """Writes the shares into one projection's (or layer's) factors, rank beside rank; returns keys of other shapes."""
    misfits, start = [], 0
    for share in shares:
        rank = slice(start, start + share.rank)
        start = rank.stop
        pair, (key_a, key_b) = share.pair, share.pair.keys
        if a[:, rank].shape != pair.a.T.shape:
            misfits.append(f"{key_a} of {pair.a.shape}")
        elif any(b[(rank, *index)].shape != rows.shape for index, rows in share.rows):
            misfits.append(f"{key_b} of {pair.b.shape}")
        else:
            a[:, rank] = pair.a.T
            for index, rows in share.rows:
                b[(rank, *index)] = rows
    return misfits
