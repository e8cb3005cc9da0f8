"""The stream of batches from files: rows in the order of `order.py`, read at their bucket's size or found in caches."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

from osjax.errors import OsjaxError
from osjax.text.annotate import annotate, with_fps
from osjax.training.buckets import Bucket, Sorted, cut_of, sort_clips
from osjax.training.cache import Cache, Entries, clip_key, text_key
from osjax.training.clips import BrokenClip, Cut, read_cut
from osjax.training.options import DataOptions
from osjax.training.order import Order, Place
from osjax.training.streams import Indexed
from osjax.training.table import Clip, listed, read_table

T = TypeVar("T")

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Batch:
    """One process's rows of a batch.

    indices: of the clips in their table; captions: as the text encoders get them; video_bthwc: uint8 [B, T, H, W, 3] of
    the bucket's size, None where `latents` holds what is made of it; latents, texts: None without that cache.
    """

    bucket: Bucket
    indices: tuple[int, ...]
    captions: list[str]
    video_bthwc: np.ndarray | None
    latents: Entries | None
    texts: Entries | None


@dataclasses.dataclass(frozen=True)
class Row:
    """What a row of a batch shows: a clip, by its number in the table, and which piece of it."""

    index: int
    clip: Clip
    cut: Cut
    bucket: Bucket

    def frames(self) -> np.ndarray:
        """uint8 [T, H, W, 3] of the bucket's size. Raises BrokenClip."""
        return read_cut(self.clip.path, self.cut, self.bucket.height, self.bucket.width)

    def key(self) -> str:
        """Under which a cache holds what is made of the frames. Raises BrokenClip for a file that is gone."""
        return clip_key(self.clip.path, self.cut, self.bucket.height, self.bucket.width)


class Loader(Indexed[Batch]):
    """Batches without end, each from one bucket, and from each bucket as often as it has clips.

    A file that cannot be read is logged and kept in `broken` (path → why), and another of its bucket stands in for it.
    Which one depends on the files alone, so that a resumed run sees the same batches.
    """

    def __init__(
        self,
        clips: Sequence[Clip],
        buckets: Sequence[Bucket],
        *,
        fps: float,
        rows: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
        workers: int = 8,
        latents: Cache | None = None,
        texts: Cache | None = None,
    ):
        """fps: the rate that clips are brought close to; rows: of a batch that each process reads; workers: files read
        at a time; latents, texts: where to look for what is made of frames and of captions.

        Raises OsjaxError if no clip fits a bucket.
        """
        found = sort_clips(clips, buckets, fps)
        _report(found, clips, buckets)
        self.broken: dict[str, str] = {}
        self._unreadable: set[tuple[str, Cut]] = set()
        self._noting = threading.Lock()
        self._clips, self._fps = clips, fps
        self._members = list(found.members.items())
        self._order = Order(tuple(len(indices) for _, indices in self._members), rows * process_count, seed)
        self._mine = slice(process_index * rows, (process_index + 1) * rows)
        self._fingerprint = hashlib.sha256(repr((self._order, self._members)).encode()).hexdigest()
        self._latents, self._texts = latents, texts
        self._pool = ThreadPoolExecutor(workers, thread_name_prefix="clips")
        super().__init__(self._make)

    def get_state(self) -> dict[str, Any]:
        return super().get_state() | {"order": self._fingerprint}

    def set_state(self, state: dict[str, Any]) -> None:
        """Raises OsjaxError if the clips, the buckets, the batch size or the seed were others when it was taken."""
        if state.get("order") != self._fingerprint:
            raise OsjaxError(
                "the clips, their buckets, the batch size or the seed are not those this run was started with: "
                "restore them, or start another run"
            )
        super().set_state(state)

    def close(self) -> None:
        super().close()
        self._pool.shutdown()
        if self.broken:
            _log.warning("%d files could not be used: %s", len(self.broken), listed(self.broken))

    def _make(self, step: int) -> Batch:
        places = self._order.batch(step)[self._mine]
        latents = None
        if self._latents is not None:
            rows, keys = self._each(places, Row.key)
            latents = self._latents.look_up(keys)
            if latents.arrays is not None:
                return self._batch(rows, None, latents)
        rows, clips = self._each(places, Row.frames)
        if latents is not None:  # other rows perhaps, now that files were opened
            latents = Entries(tuple(row.key() for row in rows), None)
        return self._batch(rows, np.stack(clips), latents)

    def _batch(self, rows: Sequence[Row], video_bthwc: np.ndarray | None, latents: Entries | None) -> Batch:
        captions = [self._caption(row) for row in rows]
        texts = None if self._texts is None else self._texts.look_up([text_key(caption) for caption in captions])
        return Batch(rows[0].bucket, tuple(row.index for row in rows), captions, video_bthwc, latents, texts)

    def _caption(self, row: Row) -> str:
        """The text with the frame rate that the piece has, and the motion score if it is known."""
        fps = round(row.clip.fps / row.cut.interval)
        score = row.clip.motion_score
        return with_fps(row.clip.text, fps) if score is None else annotate(row.clip.text, fps, f"{score:g}")

    def _each(self, places: Sequence[Place], read: Callable[[Row], T]) -> tuple[list[Row], list[T]]:
        """What `read` makes of the row at each place, several at a time."""
        results = list(self._pool.map(lambda place: self._at(place, read), places))
        return [row for row, _ in results], [result for _, result in results]

    def _at(self, place: Place, read: Callable[[Row], T]) -> tuple[Row, T]:
        """The clip that is due there, or the first after it that can be read."""
        bucket, members = self._members[place.bucket]
        for number in self._order.clips(place):
            clip = self._clips[members[number]]
            row = Row(members[number], clip, cut_of(clip, bucket, self._fps, place.cycle), bucket)
            if (clip.path, row.cut) in self._unreadable:
                continue
            try:
                return row, read(row)
            except BrokenClip as error:
                self._note(row, error)
        raise OsjaxError(
            f"none of the {len(members)} clips for {bucket} can be read (such as {clip.path}, which "
            f"{self.broken[clip.path]}): mend them, or take the bucket out of the config"
        )

    def _note(self, row: Row, error: BrokenClip) -> None:
        """Remembers a piece that cannot be read; says so once for each file.

        Other pieces of the file may be sound, and have to be used whether or not this one was ever asked for: else what
        follows would depend on where the run was resumed.
        """
        with self._noting:
            self._unreadable.add((row.clip.path, row.cut))
            if row.clip.path not in self.broken:
                self.broken[row.clip.path] = error.reason
                _log.warning("%s", error)


def open_loader(
    data: DataOptions,
    buckets: Sequence[Bucket],
    rows: int,
    seed: int,
    process_index: int = 0,
    process_count: int = 1,
    *,
    latents: Cache | None = None,
    texts: Cache | None = None,
    progress: bool = True,
) -> Loader:
    """The loader of a config whose `data.path` is a table; for the rest see `Loader`.

    Raises OsjaxError as `read_table` and `Loader` do.
    """
    return Loader(
        read_table(data.path, workers=data.workers, progress=progress),
        buckets,
        fps=data.fps,
        rows=rows,
        seed=seed,
        process_index=process_index,
        process_count=process_count,
        workers=data.workers,
        latents=latents,
        texts=texts,
    )


def _report(found: Sorted, clips: Sequence[Clip], buckets: Sequence[Bucket]) -> None:
    """Logs how many clips each bucket has and which are left out. Raises OsjaxError if all are."""
    if not found.members:
        shortest = min(bucket.num_frames for bucket in buckets)
        raise OsjaxError(
            f"none of {len(clips)} clips fits a bucket ({len(found.too_short)} are shorter than {shortest} frames, "
            f"{len(found.too_small)} have too few pixels): change data.num_frames or data.resolution"
        )
    for bucket, indices in found.members.items():
        _log.info("%s: %d clips", bucket, len(indices))
    for indices, reason in ((found.too_short, "too short"), (found.too_small, "too small")):
        if indices:
            names = listed([clips[index].path for index in indices])
            _log.warning("%d of %d clips are left out, being %s: %s", len(indices), len(clips), reason, names)
