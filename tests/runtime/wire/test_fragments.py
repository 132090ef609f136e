"""Messages in fragments: split where they are sent, and joined where they arrive."""

from __future__ import annotations

import numpy as np
import pytest

from splitonnx.codecs import Chunk, encode_tensors
from splitonnx.runtime.wire.buffers import BufferPool
from splitonnx.runtime.wire.fragments import FRAGMENT, JOINED_BYTES, JoinedFragments, split_message

LARGE = {"x": np.arange(FRAGMENT, dtype=np.float32)}  # four fragments


class Refusing(BufferPool):
    """A pool without memory."""

    def take(self, size: int) -> memoryview:
        raise MemoryError


def join(parts: list[bytes], *, most: int | None = None) -> Chunk | bytearray:
    joined = JoinedFragments(BufferPool(), most)
    for part in parts:
        joined.add(part)
    return joined.join()


def split(chunks: list[Chunk]) -> list[bytes]:
    sent = split_message(chunks)
    return [sent] if isinstance(sent, bytes) else [bytes(part) for part in sent]


@pytest.mark.parametrize("size", [0, 1, JOINED_BYTES, JOINED_BYTES + 1, 3 * JOINED_BYTES])
def test_what_arrives_in_fragments_is_what_was_sent(size: int) -> None:
    content = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    parts = split([content[:100], content[100:]])
    assert join(parts) == content
    assert all(len(part) <= FRAGMENT for part in parts)


def test_a_large_message_of_no_told_size_grows_in_place() -> None:
    large = join([b"a" * JOINED_BYTES, b"b", b"c"])
    assert isinstance(large, bytearray)
    assert large[-2:] == b"bc"
    assert isinstance(join([b"a", b"b"]), bytes)


def test_a_message_that_tells_its_size_is_joined_in_memory_of_the_pool() -> None:
    chunks = encode_tensors(LARGE)
    parts, pool = split(chunks), BufferPool()
    joined = JoinedFragments(pool)
    for part in parts:
        joined.add(part)
    content = joined.join()
    assert content == b"".join(chunks)
    del joined, content
    assert pool.idle_bytes >= LARGE["x"].nbytes


@pytest.mark.parametrize("most", [None, 100])
def test_a_size_that_is_not_believed_changes_nothing(most: int | None) -> None:
    parts = split(encode_tensors(LARGE))
    assert join(parts, most=most) == b"".join(parts)


def test_without_memory_for_the_whole_message_it_grows() -> None:
    parts = split(encode_tensors(LARGE))
    joined = JoinedFragments(Refusing())
    for part in parts:
        joined.add(part)
    assert joined.join() == b"".join(parts)


def test_a_message_may_be_longer_or_shorter_than_its_header_tells() -> None:
    parts = split(encode_tensors(LARGE))
    assert join([*parts, b"more"]) == b"".join(parts) + b"more"
    assert join(parts[:-1]) == b"".join(parts[:-1])


def test_a_fragment_can_be_received_where_it_stays() -> None:
    first, second, third, *rest = split(encode_tensors(LARGE))
    joined = JoinedFragments(BufferPool())
    assert joined.place(len(second)) is None  # nothing is known yet
    joined.add(first)
    places = [joined.place(len(second)), joined.place(len(third), ahead=len(second))]
    for place, content in zip(places, (second, third), strict=True):
        assert place is not None
        place[:] = content
        joined.add(place)
    for part in rest:
        joined.add(part)
    assert joined.join() == b"".join([first, second, third, *rest])
    assert joined.place(1) is None  # the message is complete
