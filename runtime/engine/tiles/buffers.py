"""Memory for the outputs of a stage, which is used again once nothing refers to it any more.

Fresh memory costs a page fault for every few kilobytes, which takes as long as half an update.  A
training step makes the state anew while the old one is still needed, and frees the old one then:
so two sets of buffers take turns, which are as many as without this module.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Iterable

import numpy as np

from splitonnx.runtime.engine.tiles.regions import FixedShape

_ALIGNMENT = 64


class BufferPool:
    """Buffers for arrays of float32 in the given shapes, one for each mention of a shape.

    No more than that are kept while nothing refers to them; with ``keeps=False``, none is.
    """

    def __init__(self, shapes: Iterable[FixedShape], *, keeps: bool) -> None:
        counts = Counter(map(math.prod, shapes))
        # A bounded deque: its methods are atomic, and a buffer may be freed at any time.
        self._free = {
            size: deque[np.ndarray](maxlen=count if keeps else 0) for size, count in counts.items()
        }

    def take(self, shape: FixedShape) -> np.ndarray:
        """Return an array that nothing else refers to, with values that mean nothing.

        When neither the array nor a view of it is left, its memory is used again.
        """
        free = self._free[math.prod(shape)]
        try:
            memory = free.pop()
        except IndexError:
            memory = _allocate(math.prod(shape))
        return np.asarray(_Buffer(memory, free)).reshape(shape)


class _Buffer:
    """The owner of an array's memory, which goes back to the pool with it."""

    __slots__ = ("__array_interface__", "_free", "_memory")

    def __init__(self, memory: np.ndarray, free: deque[np.ndarray]) -> None:
        self._memory = memory
        self._free = free
        self.__array_interface__ = memory.__array_interface__

    def __del__(self) -> None:
        self._free.append(self._memory)


def _allocate(size: int) -> np.ndarray:
    """Return an array of float32 whose memory begins at a line of the cache."""
    raw = np.empty(size * 4 + _ALIGNMENT, np.uint8)
    start = -raw.ctypes.data % _ALIGNMENT
    return raw[start : start + size * 4].view(np.float32)
