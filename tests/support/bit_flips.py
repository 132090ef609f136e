"""Files in which single bits are flipped."""

from __future__ import annotations

from collections.abc import Iterator
from io import FileIO
from pathlib import Path


def flip(path: Path, position: int) -> None:
    """Flip one bit of one byte."""
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << position % 8
    path.write_bytes(content)


def flips(path: Path) -> Iterator[None]:
    """Flip one bit of each byte in turn; after the last one the file is as before."""
    content = path.read_bytes()
    with path.open("r+b", buffering=0) as file:
        for position, byte in enumerate(content):
            _write(file, position, byte ^ 1 << position % 8)
            yield
            _write(file, position, byte)


def _write(file: FileIO, position: int, byte: int) -> None:
    file.seek(position)
    file.write(bytes([byte]))
