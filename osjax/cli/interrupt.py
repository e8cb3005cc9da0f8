"""Ctrl-C that cannot get lost.

Python raises KeyboardInterrupt wherever the main thread happens to be. Inside a callback of the garbage collector (JAX
has one), of a weak reference or of a foreign library the exception is printed and dropped, and the work goes on.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

AGAIN_AFTER = 2.0  # seconds; enough for the handlers of the first exception to tidy up


@contextlib.contextmanager
def insistent_interrupt() -> Iterator[None]:
    """Inside the block SIGINT raises KeyboardInterrupt, and again every two seconds until the block has been left.

    Does nothing outside the main thread, or where SIGINT is ignored or already handled in another way.
    """
    usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not usual or threading.current_thread() is not threading.main_thread():
        yield
        return
    alarm, hook = signal.signal(signal.SIGALRM, _raise_again), sys.unraisablehook
    signal.signal(signal.SIGINT, _raise_again)
    sys.unraisablehook = lambda dropped: dropped.exc_type is KeyboardInterrupt or hook(dropped)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGALRM, alarm)
        sys.unraisablehook = hook


def _raise_again(number: int, frame: FrameType | None) -> None:
    signal.setitimer(signal.ITIMER_REAL, AGAIN_AFTER)
    raise KeyboardInterrupt
