"""Memory for large received messages, which is used again once a message's tensors are gone.

Fresh memory costs as much as receiving a message does: the system clears each of its pages when it
is first used.  A step's messages have the same sizes as those of the step before, whose memory is
free by then.
"""

from __future__ import annotations

import threading
import weakref
from collections import deque

import numpy as np

IDLE_BYTES = 128 << 20
"""Most bytes that a pool keeps while no message uses them."""
_UNIT = 1 << 20
"""The sizes of blocks are multiples of this, as messages differ by a few bytes."""


class BufferPool:
    """A pool of memory blocks, each of which belongs to one message at a time.

    A block returns to the pool when the last view of it is gone, in whatever thread that happens.
    ``most`` is the largest number of bytes that are kept; above it, the block that has been idle
    for longest is freed.
    """

    def __init__(self, most: int = IDLE_BYTES) -> None:
        self._most = most
        self._mutex = threading.Lock()
        self._returned: deque[np.ndarray] = deque()  # which any thread may add to, without a lock
        self._idle: list[np.ndarray] = []  # the newest last

    @property
    def idle_bytes(self) -> int:
        """Return how many bytes are kept that no message uses."""
        return sum(block.nbytes for block in [*self._idle, *self._returned])

    def take(self, size: int) -> memoryview:
        """Return writable memory of ``size`` bytes with any content.

        Raises:
            MemoryError: there is not enough memory.
        """
        with self._mutex:
            self._settle()
            block = self._find(size)
        if block is None:
            block = np.empty(-(-size // _UNIT) * _UNIT, np.uint8)
        lease = block[:size]
        finalizer = weakref.finalize(lease, self._give_back, block)
        finalizer.atexit = False
        return lease.data

    def _find(self, size: int) -> np.ndarray | None:
        """Remove the smallest idle block that is large enough, if it is not far too large."""
        fitting = [block for block in self._idle if size <= block.nbytes <= 2 * size]
        if not fitting:
            return None
        found = min(fitting, key=lambda block: block.nbytes)
        self._idle = [block for block in self._idle if block is not found]
        return found

    def _give_back(self, block: np.ndarray) -> None:
        """Keep a block; may be called at any time, even while this thread holds the lock."""
        self._returned.append(block)
        if self._mutex.acquire(blocking=False):
            try:
                self._settle()
            finally:
                self._mutex.release()

    def _settle(self) -> None:
        while self._returned:
            self._idle.append(self._returned.popleft())
        while sum(block.nbytes for block in self._idle) > self._most:
            del self._idle[0]
