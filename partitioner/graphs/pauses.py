"""Garbage collection, paused for as long as a model is worked on.

A graph's nodes and values refer to one another, so Python's collector of cycles goes through all
of them again and again while graphs grow, and finds nothing: it took nearly half of the time on a
model of 10,000 nodes.  This module knows no graphs.
"""

from __future__ import annotations

import atexit
import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager

_LOCK = threading.Lock()
_COUNT = [0, False]
"""How many pauses there are, in whatever thread, and whether the collector was on before them."""


@contextmanager
def pause_collection() -> Iterator[None]:
    """Keep the collector off; behind the last pause it is as it was before the first one."""
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
    """Keep the collector off for the rest of the process, its end included.

    For a process that ends with the model it works on: the system takes all memory back at once,
    where the collector goes through millions of objects only to free them one by one.
    """
    gc.disable()
    atexit.register(gc.freeze)  # the interpreter's last collection leaves out what is frozen
