"""Streams of batches: what the training loop draws from, and the state that makes a resumed run see the same ones."""

from __future__ import annotations

import collections
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Generic, Protocol, TypeVar

from osjax.errors import OsjaxError

T = TypeVar("T")
Given = TypeVar("Given", covariant=True)


class Stream(Protocol[Given]):
    """An endless stream of batches that can be taken up again where it was left."""

    def __next__(self) -> Given:
        """The next batch."""

    def get_state(self) -> dict[str, Any]:
        """Where the stream stands, JSON: the batches given so far are behind it, prefetched ones are not."""

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to where a stream of the same making stood; the same batches follow. Raises OsjaxError for others'."""

    def close(self) -> None:
        """Ends its threads and processes; the stream gives nothing more."""


class Indexed(Generic[T]):
    """The stream `make(0)`, `make(1)`, … of a pure function; `prefetch` of them are made ahead, in one thread.

    What `make` raises, `__next__` raises, at the batch it belongs to and again when that batch is asked for again.
    """

    def __init__(self, make: Callable[[int], T], step: int = 0, prefetch: int = 2):
        if prefetch < 1:
            raise ValueError("a thread that makes batches ahead makes at least one")
        self._make = make
        self._step = step
        self._prefetch = prefetch
        self._pending: collections.deque[Future[T]] = collections.deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="batches")

    def __next__(self) -> T:
        self._top_up()
        try:
            batch = self._pending[0].result()
        except BaseException:
            self._forget()
            raise
        self._pending.popleft()
        self._step += 1
        self._top_up()
        return batch

    def get_state(self) -> dict[str, Any]:
        return {"step": self._step}

    def set_state(self, state: dict[str, Any]) -> None:
        step = state.get("step")
        if not isinstance(step, int) or step < 0:
            raise OsjaxError(f"{state} is no state of this stream: resume with the data the run was started with")
        self._forget()
        self._step = step

    def close(self) -> None:
        self._forget()
        self._thread.shutdown()

    def _top_up(self) -> None:
        while len(self._pending) < self._prefetch:
            self._pending.append(self._thread.submit(self._make, self._step + len(self._pending)))

    def _forget(self) -> None:
        """Drops what was made ahead; the batch being made runs to its end unseen."""
        for future in self._pending:
            future.cancel()
        self._pending.clear()
