"""Large tensors piece by piece: every byte once and in order, and nothing kept of a file."""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np
import pytest

from splitonnx import chunks
from splitonnx.chunks import PIECE, hold, iter_chunks


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> int:
    """Pieces of one page."""
    monkeypatch.setattr(chunks, "PIECE", mmap.PAGESIZE)
    return mmap.PAGESIZE


def test_a_piece_is_whole_pages() -> None:
    assert PIECE % (64 << 10) == 0
    assert PIECE % mmap.PAGESIZE == 0


@pytest.mark.parametrize("extra", [-1, 0, 1])
def test_every_byte_comes_once_and_in_order(short: int, extra: int) -> None:
    content = bytes(number % 251 for number in range(3 * short + extra))
    pieces = list(iter_chunks(content))
    assert b"".join(pieces) == content
    assert max(map(len, pieces)) <= short
    assert len(pieces) == 3 + (extra > 0)


def test_nothing_has_no_pieces() -> None:
    assert list(iter_chunks(b"")) == []
    assert list(iter_chunks(np.empty((0, 3), np.float32))) == []


@pytest.mark.parametrize("array", [np.arange(6.0).reshape(2, 3), np.array(7), np.array([True])])
def test_an_array_gives_its_bytes_as_they_lie(array: np.ndarray) -> None:
    assert b"".join(iter_chunks(array)) == array.tobytes()


def test_small_buffers_are_not_copied() -> None:
    array = np.zeros(4, np.float32)
    (piece,) = iter_chunks(array)
    array[0] = 1.0
    assert bytes(piece) == array.tobytes()


def map_file(path: Path, access: int) -> mmap.mmap:
    with path.open("r+b") as file:
        return mmap.mmap(file.fileno(), 0, access=access)


def test_a_mapped_file_is_read_again_after_its_pages_were_given_back(
    short: int, tmp_path: Path
) -> None:
    content = bytes(number % 253 for number in range(5 * short + 17))
    (tmp_path / "file").write_bytes(content)
    view = memoryview(map_file(tmp_path / "file", mmap.ACCESS_READ))
    for _ in range(2):
        assert b"".join(bytes(piece) for piece in iter_chunks(view[3:])) == content[3:]


def test_a_page_that_was_written_to_is_not_given_back(short: int, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(4 * short))
    copy = memoryview(map_file(tmp_path / "file", mmap.ACCESS_COPY))
    copy[0] = copy[-1] = 7
    for _ in iter_chunks(copy):
        pass
    assert (copy[0], copy[-1]) == (7, 7)


def test_what_is_held_does_not_change_with_its_file(short: int, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"a" * (2 * short + 5))
    held = hold(memoryview(map_file(path, mmap.ACCESS_READ)))
    with path.open("r+b") as file:
        file.write(b"b" * short)
    assert bytes(held) == b"a" * (2 * short + 5)
    assert held.readonly


def test_nothing_can_be_held() -> None:
    assert bytes(hold(memoryview(b""))) == b""
