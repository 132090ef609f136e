"""Add a SHA-256 checksum to tensor files, and verify it to detect altered files.

The checksum is stored in the header's metadata under ``sha256``.  It is computed over the whole
file, with 64 zeros in place of the checksum itself.  It detects accidental changes but not attacks,
because an attacker can change the checksum as well.  This module works on bytes and does not access
the file system.
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
    """Encode tensors and metadata as a tensor file that contains its own checksum.

    The file is returned as a list of chunks.  The tensors are not copied.

    Raises:
        FormatError: a tensor has an element type that cannot be written.
    """
    header, *data = encode_tensors(tensors, {CHECKSUM: _BLANK, **metadata})
    header = bytes(header)
    start = header.index(_MARK) + len(_MARK)
    found = _sum([header, *data]).encode()
    return [header[:start] + found + header[start + len(found) :], *data]


def has_valid_checksum(content: memoryview, metadata: Mapping[str, str]) -> bool:
    """Return whether the content of a tensor file matches the checksum in its ``metadata``.

    ``content`` must be a well-formed tensor file.
    """
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
