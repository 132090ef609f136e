"""Pause Python's garbage collector while a model is processed.

The nodes and values of a graph refer to each other.  While a graph grows, the collector scans all
of them again and again without finding anything to free.  On a model with 10,000 nodes, this took
nearly half of the time.
"""

from __future__ import annotations

import atexit
import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_LOCK = threading.Lock()
_COUNT = [0, False]
"""The number of current pauses in all threads, and whether the collector was on before them."""


@contextmanager
def pause_collection() -> Iterator[None]:
    """Disable the garbage collector during a ``with`` block.

    If several threads disable it at the same time, the previous state is restored when the last of
    them leaves its block.
    """
    with _LOCK:
        if not _COUNT[0]:
            _COUNT[1] = gc.isenabled()
            gc.disable()
        _COUNT[0] += 1
    try:
        yield
    finally:
        with _LOCK:
            _COUNT[0] -= 1
            if not _COUNT[0] and _COUNT[1]:
                gc.enable()


def pause_to_the_end() -> None:
    """Disable the garbage collector for the rest of the process, including its exit.

    Use this in a process that exits after it has processed a model.  The operating system then
    frees all memory at once, while the collector would free millions of objects one by one.
    """
    gc.disable()
    atexit.register(gc.freeze)  # the last collection skips frozen objects
