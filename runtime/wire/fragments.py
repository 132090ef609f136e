"""Split and join large messages, so that neither side holds a large message in memory twice."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from splitonnx.codecs import Chunk

FRAGMENT = 1 << 20
"""Size of a fragment in bytes; a smaller message is sent in one piece."""
JOINED_BYTES = 4 << 20
"""Size in bytes of the largest message whose fragments are joined at the end.

This is faster than growing a buffer, but briefly takes twice the memory.
"""


def split_message(chunks: Sequence[Chunk]) -> bytes | Iterator[Chunk]:
    """Return a message's bytes if it is small, or an iterator of fragments if it is large.

    The message consists of ``chunks``, one after the other.  It is small if it has at most
    ``FRAGMENT`` bytes.
    """
    if sum(map(len, chunks)) <= FRAGMENT:
        return b"".join(chunks)
    return _fragment(chunks)


def _fragment(chunks: Sequence[Chunk]) -> Iterator[Chunk]:
    for chunk in chunks:
        view = memoryview(chunk)
        for start in range(0, len(view), FRAGMENT):
            yield view[start : start + FRAGMENT]


class JoinedFragments:
    """A message that arrives in fragments.

    The fragments of a large message are appended to one buffer as they arrive, so that they need
    not be copied again in :meth:`join`.
    """

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._grown: bytearray | None = None
        self._size = 0

    def add(self, part: bytes) -> None:
        """Add the next fragment of the message."""
        self._size += len(part)
        if self._grown is None and self._size > JOINED_BYTES:
            self._grown = bytearray().join(self._parts)
            self._parts.clear()
        if self._grown is None:
            self._parts.append(part)
        else:
            self._grown += part

    def join(self) -> bytes | bytearray:
        """Return the complete message."""
        return b"".join(self._parts) if self._grown is None else self._grown
