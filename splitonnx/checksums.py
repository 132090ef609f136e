"""Checksums: a tensor file carries a SHA-256 over all of itself, so that no change goes unnoticed.

The sum is in the header's metadata under ``sha256`` and is taken over every byte of the file,
with 64 zeros in the sum's own place.  Nobody is kept from altering a file and its sum: this
finds accidents, not attacks.  This module knows bytes and no file system.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

import numpy as np

from splitonnx.chunks import iter_chunks
from splitonnx.codecs import Chunk, encode_tensors

CHECKSUM = "sha256"

_MARK = f'"{CHECKSUM}":"'.encode()
_BLANK = "0" * 64


def encode_with_checksum(
    tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> list[Chunk]:
    """Write tensors and metadata as chunks of one file with its checksum; no tensor is copied.

    Raises:
        FormatError: an element type that cannot be written.
    """
    header, *data = encode_tensors(tensors, {CHECKSUM: _BLANK, **metadata})
    header = bytes(header)
    start = header.index(_MARK) + len(_MARK)
    found = _sum([header, *data]).encode()
    return [header[:start] + found + header[start + len(found) :], *data]


def has_valid_checksum(content: memoryview, metadata: Mapping[str, str]) -> bool:
    """Return whether a well-formed file with this ``metadata`` is as it was written."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = bytes(content[:end])
    start = header.find(_MARK) + len(_MARK)
    blank = header[:start] + _BLANK.encode() + header[start + len(_BLANK) :]
    return metadata.get(CHECKSUM) == _sum([blank, content[end:]])


def _sum(chunks: Iterable[Chunk]) -> str:
    found = hashlib.sha256()
    for chunk in chunks:
        for piece in iter_chunks(chunk):
            found.update(piece)
    return found.hexdigest()
