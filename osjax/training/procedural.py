"""Streams of shapes clips: drawn anew for every batch, or encoded once and kept in host memory.

Batch number `step` is a pure function of the seed and the step, on every host its own part of it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
from tqdm import tqdm

from osjax.text.annotate import annotate
from osjax.training import captions
from osjax.training.batches import Drawn, Encoded, End, Latents
from osjax.training.buckets import Bucket
from osjax.training.drawing import Tracks, stack, tracks
from osjax.training.options import DataOptions
from osjax.training.shapes import Scene, scene
from osjax.training.streams import Indexed


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
    def clip(number: int, bucket: Bucket) -> tuple[Scene, Tracks]:
        made = scene(seed, number)
        return made, tracks(made, bucket.height, bucket.width, bucket.num_frames, data.fps)

    def make(step: int) -> Drawn:
        rng = np.random.default_rng((seed, step))
        bucket = buckets[rng.integers(len(buckets))]
        everyone = share.count * share.clips
        numbers = rng.integers(data.clips, size=everyone) if data.clips else step * everyone + np.arange(everyone)
        mine = numbers[share.index * share.clips :][: share.clips]
        return _drawn([clip(int(number), bucket) for number in mine], bucket, data.fps, rng)

    return Indexed(make)


@dataclasses.dataclass(frozen=True)
class Shelf:
    """Encoded clips of one bucket: z [N, t, h, w, c], ends [N, …] each, and the scenes they show."""

    z_nthwc: np.ndarray
    ends: Mapping[End, np.ndarray]
    scenes: Sequence[Scene]


def encoded_shelves(
    data: DataOptions,
    buckets: Sequence[Bucket],
    share: Share,
    seed: int,
    encode: Callable[[Drawn], Latents],
    progress: bool = True,
) -> list[Shelf]:
    """Draws and encodes this host's part of `data.clips` scenes, as many of each bucket, a batch's size at a time.

    encode: gives the latents in this host's memory (`batches.local_rows`).
    """
    batches = max(1, data.clips // (len(buckets) * share.clips * share.count))
    bar = tqdm(total=batches * len(buckets) * share.clips, desc="encode clips", unit="clip", disable=not progress)
    shelves = []
    with bar:
        for number, bucket in enumerate(buckets):
            rows, scenes = [], []
            for batch in range(batches):
                first = (((number * batches) + batch) * share.count + share.index) * share.clips
                some = [scene(seed, first + i) for i in range(share.clips)]
                size = (bucket.height, bucket.width, bucket.num_frames)
                made = [(each, tracks(each, *size, data.fps)) for each in some]
                rows.append(encode(_drawn(made, bucket, data.fps, np.random.default_rng(0))))
                scenes += some
                bar.update(share.clips)
            ends = {end: np.concatenate([row.ends[end] for row in rows]) for end in rows[0].ends}
            shelves.append(Shelf(np.concatenate([row.z_bthwc for row in rows]), ends, scenes))
    return shelves


def encoded_stream(shelves: Sequence[Shelf], data: DataOptions, clips: int, seed: int) -> Indexed[Encoded]:
    """Batches of `clips` clips of one shelf, each time with a new caption."""

    def make(step: int) -> Encoded:
        rng = np.random.default_rng((seed, step))
        shelf = shelves[rng.integers(len(shelves))]
        rows = np.sort(rng.choice(len(shelf.scenes), clips, replace=len(shelf.scenes) < clips))
        ends = {end: each[rows] for end, each in shelf.ends.items()}
        return Encoded(shelf.z_nthwc[rows], ends, _captions([shelf.scenes[row] for row in rows], data.fps, rng))

    return Indexed(make)


def _drawn(clips: Sequence[tuple[Scene, Tracks]], bucket: Bucket, fps: int, rng: np.random.Generator) -> Drawn:
    scenes, paths = zip(*clips, strict=True)
    return Drawn(stack(paths), bucket.height, bucket.width, _captions(scenes, fps, rng))


def _captions(scenes: Iterable[Scene], fps: int, rng: np.random.Generator) -> list[str]:
    return [annotate(captions.caption(each, rng), fps, each.score) for each in scenes]
