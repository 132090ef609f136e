"""Tuning of this process's heap and garbage collector.

ONNX Runtime's arenas never shrink below the size of their largest task, so workers run without
arenas.  Instead they use the heap of the C library, which keeps freed memory, so that the next task
causes fewer page faults.  This module makes the heap return that memory to the system when there is
too much of it.  That requires glibc; other C libraries return memory by themselves.
"""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from contextlib import suppress
from pathlib import Path

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3
_KEPT_BUFFERS = 1 << 24
_STATISTICS = Path("/proc/self/statm")


class Heap:
    """The heap of this process, which keeps freed memory from one task to the next."""

    def __init__(self) -> None:
        self._library = _find_glibc()
        self._needed: int | None = None
        if self._library is not None:
            self._keep_freed()

    def tidy(self, most: int) -> None:
        """Return freed memory to the system if the heap may hold more than ``most`` bytes of it."""
        if self._library is None:
            return
        if self._needed is None or measure_private() - self._needed > most:
            self._library.malloc_trim(0)
            self._needed = measure_private()
        else:
            self._needed = min(self._needed, measure_private())

    def _keep_freed(self) -> None:
        """Make the heap keep large freed blocks, too, which it would otherwise unmap at once."""
        assert self._library is not None
        largest = (1 << 31) - 1
        if not self._library.mallopt(_MMAP_THRESHOLD, largest):  # older versions accept no more
            self._library.mallopt(_MMAP_THRESHOLD, 1 << 25)
        self._library.mallopt(_TRIM_THRESHOLD, largest)
        self._library.mallopt(_TOP_PAD, 1 << 24)


def keep_buffers() -> None:
    """Make the heap reuse the memory of freed messages instead of returning it to the system.

    Up to ``_KEPT_BUFFERS`` bytes are kept per thread.  Without this, depending on the order in
    which blocks are freed, memory pages may be returned to the system and requested again for every
    message.  That takes up to a twentieth of the time of a step that sends 1 MiB each way.
    """
    library = _find_glibc()
    if library is not None:
        library.mallopt(_MMAP_THRESHOLD, _KEPT_BUFFERS)
        library.mallopt(_TRIM_THRESHOLD, _KEPT_BUFFERS)


def exempt_loaded() -> None:
    """Exempt all objects that exist now from garbage collection.

    In a process that serves or trains, most of these objects belong to modules and are never freed.
    A full collection that visits them takes 50 to 75 ms.  During that time no thread can run, so no
    message is answered.  Call this only in processes that run nothing but splitonnx: in other
    programs, objects that exist now may become garbage later.
    """
    gc.collect()
    gc.freeze()


def measure_private() -> int:
    """Return how many bytes of private (not shared) memory this process uses; Linux only."""
    resident, shared = _STATISTICS.read_text().split()[1:3]
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")


def _find_glibc() -> ctypes.CDLL | None:
    if sys.platform != "linux":
        return None
    with suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        library.mallopt.argtypes = (ctypes.c_int, ctypes.c_int)
        library.malloc_trim.argtypes = (ctypes.c_size_t,)
        return library
    return None
