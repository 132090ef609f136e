"""Files in which single bits are flipped."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path


def flip(path: Path, position: int) -> None:
    """Flip one bit of one byte."""
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << position % 8
    path.write_bytes(content)


def flips(path: Path) -> Iterator[None]:
    """Flip one bit of each byte in turn; after the last one the file is as before."""
    content = path.read_bytes()
    for position in range(len(content)):
        flip(path, position)
        yield
        path.write_bytes(content)
