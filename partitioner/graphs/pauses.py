"""Pause garbage collection while a model is processed.

A graph's nodes and values refer to one another, so Python's cyclic garbage collector scans all of
them again and again while graphs grow, and finds nothing: it took nearly half of the time on a
model of 10,000 nodes.
"""

from __future__ import annotations

import atexit
import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_LOCK = threading.Lock()
_COUNT = [0, False]
"""The number of active pauses in all threads, and whether the collector was enabled before them."""


@contextmanager
def pause_collection() -> Iterator[None]:
    """Disable the garbage collector during the block; the last pause to end restores its state."""
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

    For a process that exits once its model is done: the operating system frees all memory at once,
    but the collector would free millions of objects one by one.
    """
    gc.disable()
    atexit.register(gc.freeze)  # the interpreter's last collection leaves out what is frozen
