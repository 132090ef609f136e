"""Split and join large messages, so that neither side holds a large message in memory twice."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from splitonnx.codecs import Chunk, measure_encoded
from splitonnx.messages import MAX_HEADER
from splitonnx.runtime.wire.buffers import BufferPool

FRAGMENT = 1 << 20
"""Size of a fragment in bytes; a smaller message is sent in one piece."""
JOINED_BYTES = 4 << 20
"""Size in bytes of the largest message whose fragments are joined at the end.

This is for messages that do not tell their size.  It is faster than growing a buffer, but briefly
takes twice the memory.
"""


def split_message(chunks: Sequence[Chunk]) -> bytes | list[memoryview]:
    """Return a message's bytes if it is small, or its fragments if it is large.

    The message consists of ``chunks``, one after the other.  It is small if it has at most
    ``FRAGMENT`` bytes.
    """
    if sum(map(len, chunks)) <= FRAGMENT:
        return b"".join(chunks)
    views = [memoryview(chunk) for chunk in chunks]
    return [
        view[start : start + FRAGMENT] for view in views for start in range(0, len(view), FRAGMENT)
    ]


class JoinedFragments:
    """A message that arrives in fragments, in a buffer of its own size.

    The message's first fragment tells the size of the message, if it contains its whole header, as
    it does where :func:`split_message` made the fragments.  Memory of a size that was only
    announced is not used before the bytes are there.  Without a size, the fragments of a large
    message are appended to one growing buffer.  The buffer comes from ``pool``.  ``most`` is the
    largest size that is believed; ``None`` means any.
    """

    def __init__(self, pool: BufferPool, most: int | None = None) -> None:
        self.size = 0
        """How many bytes have been added."""
        self._pool = pool
        self._most = most
        self._parts: list[Chunk | bytearray] = []
        self._grown: bytearray | None = None
        self._buffer: memoryview | None = None
        self._placed: deque[memoryview] = deque()

    def place(self, size: int, ahead: int = 0) -> memoryview | None:
        """Return the memory of a coming fragment, to receive it there before it is added.

        ``ahead`` is the size of the fragments that are there, but are to be added before this one.
        The result is ``None`` if the message's size is not known.
        """
        start = self.size + ahead
        if self._buffer is None or start + size > len(self._buffer):
            return None
        self._placed.append(self._buffer[start : start + size])
        return self._placed[-1]

    def add(self, part: Chunk | bytearray) -> None:
        """Add the next fragment of the message."""
        start, self.size = self.size, self.size + len(part)
        if self._placed and part is self._placed[0]:
            self._placed.popleft()
        elif self._buffer is not None and self.size <= len(self._buffer):
            self._buffer[start : self.size] = part
        elif self._grown is not None:
            self._grown += part
        else:
            self._append(part)

    def _append(self, part: Chunk | bytearray) -> None:
        if self._buffer is not None:  # the message is larger than it said
            self._grown = bytearray(self._buffer[: self.size - len(part)]) + part
            self._buffer = None
            return
        self._parts.append(part)
        if len(self._parts) == 1:
            self._buffer = self._allocate(part)
        elif self.size > JOINED_BYTES:
            self._grown = bytearray().join(self._parts)
        if self._buffer is not None:
            self._buffer[: self.size] = part
        if self._buffer is not None or self._grown is not None:
            self._parts.clear()

    def _allocate(self, first: Chunk | bytearray) -> memoryview | None:
        """Return memory for the whole message if its first fragment tells its size."""
        size = measure_encoded(first, max_header=MAX_HEADER)
        if size is None or size <= len(first) or (self._most is not None and size > self._most):
            return None
        try:
            return self._pool.take(size)
        except MemoryError:
            return None

    def join(self) -> Chunk | bytearray:
        """Return the complete message."""
        if self._buffer is not None:
            return self._buffer[: self.size]
        if self._grown is not None:
            return self._grown
        return self._parts[0] if len(self._parts) == 1 else b"".join(self._parts)
