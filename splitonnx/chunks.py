"""Process large tensors in chunks, to hash or write them without holding them in memory.

A tensor that is mapped from a file uses no memory until it is read.  Each chunk's memory is
released before the next chunk is read.  This module works on buffers and memory mappings; it is
independent of file formats.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator

import numpy as np

PIECE = 8 << 20
"""The size of a chunk in bytes, a multiple of every page size."""


def iter_chunks(content: bytes | memoryview | np.ndarray) -> Iterator[memoryview]:
    """Yield the bytes of a contiguous buffer in order, ``PIECE`` bytes at a time.

    If the buffer is mapped from a file, the memory of each chunk is released when the next chunk is
    requested.  If a chunk is used again later, it is read from the file again.
    """
    flat = _flatten(content)
    mapping = _find_mapping(content)
    for start in range(0, len(flat), PIECE):
        piece = flat[start : start + PIECE]
        yield piece.data
        if mapping is not None:
            _give_back(mapping, piece)


def hold(content: memoryview) -> memoryview:
    """Copy bytes of a mapped file into memory, so that later changes to the file have no effect."""
    memory = memoryview(mmap.mmap(-1, max(1, len(content))))[: len(content)]
    start = 0
    for piece in iter_chunks(content):
        memory[start : start + len(piece)] = piece
        start += len(piece)
    return memory.toreadonly()


def _flatten(content: bytes | memoryview | np.ndarray) -> np.ndarray:
    if isinstance(content, np.ndarray):
        return content.reshape(-1).view(np.uint8)
    return np.frombuffer(content, np.uint8)


def _find_mapping(content: object) -> mmap.mmap | None:
    """Find the read-only memory mapping that a buffer is a part of."""
    while isinstance(content, np.ndarray | memoryview):
        content = content.base if isinstance(content, np.ndarray) else content.obj
    if isinstance(content, mmap.mmap) and memoryview(content).readonly:
        return content
    return None  # releasing a page that was written to could lose the change


def _give_back(mapping: mmap.mmap, piece: np.ndarray) -> None:
    if not hasattr(mapping, "madvise"):  # Windows
        return
    offset = piece.ctypes.data - np.frombuffer(mapping, np.uint8).ctypes.data
    start = offset // mmap.PAGESIZE * mmap.PAGESIZE
    mapping.madvise(mmap.MADV_DONTNEED, start, offset + piece.nbytes - start)
