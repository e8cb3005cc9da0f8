"""Streams of shapes clips: drawn anew for every batch, or encoded once and kept in host memory.

Batch number `step` is a pure function of the seed and the step, on every host its own part of it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from tqdm import tqdm

from osjax.text.annotate import annotate
from osjax.training import captions
from osjax.training.batches import Drawn, Encoded, End, Latents
from osjax.training.buckets import Bucket
from osjax.training.drawing import Tracks, stack, tracks
from osjax.training.facts import facts_of
from osjax.training.options import DataOptions
from osjax.training.shapes import Scene, scene
from osjax.training.streams import Indexed
from osjax.training.text import TokenIds

WORDINGS = 4  # captions written for each encoded clip: writing new ones at every step takes longer than the step


@dataclasses.dataclass(frozen=True)
class Share:
    """This host's part of every batch: `clips` of them, the `index`-th of `count` hosts."""

    clips: int
    index: int
    count: int


def drawn_stream(data: DataOptions, buckets: Sequence[Bucket], share: Share, seed: int) -> Indexed[Drawn]:
    """Each batch is of one bucket, all equally often, and of new scenes: their numbers never repeat.

    With `data.clips` the scenes are so many, drawn from again and again, and remembered: at small sizes making them up
    takes the host longer than a step takes the device.
    """
    recall = functools.cache if data.clips else lambda make: make

    @recall
    def made(number: int) -> Scene:
        return scene(seed, number, two_things=data.two_things)

    @recall
    def clip(number: int, bucket: Bucket) -> tuple[Scene, Tracks]:
        return made(number), tracks(made(number), bucket.height, bucket.width, bucket.num_frames, data.fps)

    def make(step: int) -> Drawn:
        rng = np.random.default_rng((seed, step))
        bucket = buckets[rng.integers(len(buckets))]
        mine = _numbers(data, share, rng, step)
        scenes, paths = zip(*(clip(number, bucket) for number in mine), strict=True)
        write = functools.partial(_captions, scenes, data.fps, (seed, step, 1))
        return Drawn(stack(paths), bucket.height, bucket.width, write)

    return Indexed(make)


class Said(NamedTuple):
    """Captions without clips: as token ids, and what they say, int32 [B, F] (`osjax.training.facts`)."""

    prompts: TokenIds
    facts_bf: np.ndarray


def said_stream(
    data: DataOptions, share: Share, seed: int, tokenize: Callable[[Sequence[str]], TokenIds]
) -> Indexed[Said]:
    """Each batch is of new scenes, each told in one way; with `data.clips`, of so many that are remembered."""
    recall = functools.cache if data.clips else lambda make: make

    @recall
    def said(number: int) -> Said:
        made = scene(seed, number, two_things=data.two_things)
        told = captions.tell(made, np.random.default_rng((seed, number, 1)))
        return Said(tokenize([annotate(told.text, data.fps, made.score)]), facts_of(made, told.mentions)[None])

    def make(step: int) -> Said:
        numbers = _numbers(data, share, np.random.default_rng((seed, step)), step)
        prompts, facts = zip(*map(said, numbers), strict=True)
        return Said(TokenIds(*map(np.concatenate, zip(*prompts, strict=True))), np.concatenate(facts))

    return Indexed(make)


@dataclasses.dataclass(frozen=True)
class Shelf:
    """Encoded clips of one bucket: z [N, t, h, w, c], ends [N, …] each, their captions as int32 [N, WORDINGS, L] for
    each text encoder."""

    z_nthwc: np.ndarray
    ends: Mapping[End, np.ndarray]
    prompts: TokenIds


def encoded_shelves(
    data: DataOptions,
    buckets: Sequence[Bucket],
    share: Share,
    seed: int,
    encode: Callable[[Drawn], Latents],
    tokenize: Callable[[Sequence[str]], TokenIds],
    progress: bool = True,
) -> list[Shelf]:
    """Draws and encodes this host's part of `data.clips` scenes, as many of each bucket, a batch's size at a time.

    encode: gives the latents in this host's memory (`batches.local_rows`). tokenize: captions → int32 [B, L] each.
    """
    batches = max(1, data.clips // (len(buckets) * share.clips * share.count))

    def make(batch: int) -> tuple[Drawn, TokenIds]:
        bucket = buckets[batch // batches % len(buckets)]  # made ahead, there are more batches than needed
        first = (batch * share.count + share.index) * share.clips
        scenes = [scene(seed, first + i, two_things=data.two_things) for i in range(share.clips)]
        paths = [tracks(each, bucket.height, bucket.width, bucket.num_frames, data.fps) for each in scenes]
        write = functools.partial(
            _captions, [each for each in scenes for _ in range(WORDINGS)], data.fps, (seed, first)
        )
        said = TokenIds(*(ids.reshape(share.clips, WORDINGS, -1) for ids in tokenize(write())))
        return Drawn(stack(paths), bucket.height, bucket.width, write), said

    bar = tqdm(total=batches * len(buckets) * share.clips, desc="encode clips", unit="clip", disable=not progress)
    shelves = []
    with bar, contextlib.closing(Indexed(make)) as stream:  # a thread makes scenes up while others are encoded
        for _ in buckets:
            rows, said = [], []
            for _ in range(batches):
                drawn, prompts = next(stream)
                rows.append(encode(drawn))
                said.append(prompts)
                bar.update(share.clips)
            ends = {end: np.concatenate([row.ends[end] for row in rows]) for end in rows[0].ends}
            prompts = TokenIds(*(np.concatenate(ids) for ids in zip(*said, strict=True)))
            shelves.append(Shelf(np.concatenate([row.z_bthwc for row in rows]), ends, prompts))
    return shelves


def encoded_stream(shelves: Sequence[Shelf], clips: int, seed: int) -> Indexed[Encoded]:
    """Batches of `clips` clips of one shelf, each time with any of their captions."""

    def make(step: int) -> Encoded:
        rng = np.random.default_rng((seed, step))
        shelf = shelves[rng.integers(len(shelves))]
        rows = np.sort(rng.choice(len(shelf.z_nthwc), clips, replace=len(shelf.z_nthwc) < clips))
        wording = rng.integers(WORDINGS, size=clips)
        ends = {end: each[rows] for end, each in shelf.ends.items()}
        return Encoded(shelf.z_nthwc[rows], ends, TokenIds(*(ids[rows, wording] for ids in shelf.prompts)))

    return Indexed(make)


def _numbers(data: DataOptions, share: Share, rng: np.random.Generator, step: int) -> list[int]:
    """This host's scenes of a batch: of `data.clips` any, else those that no other batch has."""
    everyone = share.count * share.clips
    numbers = rng.integers(data.clips, size=everyone) if data.clips else step * everyone + np.arange(everyone)
    return numbers[share.index * share.clips :][: share.clips].tolist()


def _captions(scenes: Iterable[Scene], fps: int, seed: tuple[int, ...]) -> list[str]:
    rng = np.random.default_rng(seed)
    return [annotate(captions.caption(each, rng), fps, each.score) for each in scenes]
