"""In which order clips are shown: batch number i is a pure function of i.

So one number is enough to take up a run again, whatever had been read ahead; and each process of a run knows the whole
order and reads its rows of every batch, which makes the batches the same for any number of processes.

Clips of a bucket are shuffled anew for each cycle through them. An epoch is as many clips as there are: each bucket
gives its share of batches, in a shuffled order, and clips that do not fill a batch wait for the next epoch.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
from collections.abc import Iterator

import numpy as np

_BATCHES, _CLIPS = range(2)  # what is shuffled, as a part of the seed


@dataclasses.dataclass(frozen=True)
class Place:
    """A row of a batch: place number `place` of cycle number `cycle` through the clips of a bucket."""

    bucket: int
    cycle: int
    place: int


@dataclasses.dataclass(frozen=True)
class Order:
    """The order of batches of `batch_size` from buckets that hold `sizes` clips, none of them empty."""

    sizes: tuple[int, ...]
    batch_size: int
    seed: int

    def batch(self, step: int) -> list[Place]:
        """The rows of batch number `step`, counted from 0; all are of one bucket."""
        # With a single clip it takes batch_size epochs to fill a batch, and no bucket is slower.
        epochs = range((step + 1) * self.batch_size + 1)
        epoch = bisect.bisect_right(epochs, step, key=lambda epoch: sum(self._batches_before(epoch))) - 1
        before = self._batches_before(epoch)
        buckets = _buckets_of_epoch(self, epoch)
        index = step - sum(before)
        bucket = int(buckets[index])
        earlier = before[bucket] + int(np.count_nonzero(buckets[:index] == bucket))
        first, size = earlier * self.batch_size, self.sizes[bucket]
        return [Place(bucket, *divmod(first + row, size)) for row in range(self.batch_size)]

    def clips(self, place: Place) -> Iterator[int]:
        """The clip of that row, by its number in its bucket; then the bucket's others, to be taken in its stead."""
        shuffled = _cycle(self.seed, place.bucket, place.cycle, self.sizes[place.bucket])
        for offset in range(len(shuffled)):
            yield int(shuffled[(place.place + offset) % len(shuffled)])

    def _batches_before(self, epoch: int) -> list[int]:
        """Batches that each bucket has given before that epoch: whole ones of the clips it has shown by then."""
        return [epoch * size // self.batch_size for size in self.sizes]


@functools.lru_cache(maxsize=2)
def _buckets_of_epoch(order: Order, epoch: int) -> np.ndarray:
    """The bucket of each batch of an epoch."""
    counts = np.subtract(order._batches_before(epoch + 1), order._batches_before(epoch))
    buckets = np.repeat(np.arange(len(counts)), counts)
    return np.random.default_rng([order.seed, _BATCHES, epoch]).permutation(buckets)


@functools.lru_cache(maxsize=16)
def _cycle(seed: int, bucket: int, cycle: int, size: int) -> np.ndarray:
    """The clips of a bucket as that cycle shuffles them."""
    return np.random.default_rng([seed, _CLIPS, bucket, cycle]).permutation(size)
