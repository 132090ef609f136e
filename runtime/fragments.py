"""A message in fragments, so that no side needs a second copy of a large one in its buffers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from splitonnx.codecs import Chunk

FRAGMENT = 1 << 20
"""Bytes of one fragment; what is smaller is sent in one piece."""


def split_message(chunks: Sequence[Chunk]) -> bytes | Iterator[Chunk]:
    """Return the chunks of one message in one piece, or piece by piece where they are large."""
    if sum(map(len, chunks)) <= FRAGMENT:
        return b"".join(chunks)
    return _fragment(chunks)


def _fragment(chunks: Sequence[Chunk]) -> Iterator[Chunk]:
    for chunk in chunks:
        view = memoryview(chunk)
        for start in range(0, len(view), FRAGMENT):
            yield view[start : start + FRAGMENT]
