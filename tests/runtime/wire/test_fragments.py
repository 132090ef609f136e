"""Messages in fragments: split where they are sent, and joined where they arrive."""

from __future__ import annotations

import pytest

from splitonnx.runtime.wire.fragments import FRAGMENT, JOINED_BYTES, JoinedFragments, split_message


def join(parts: list[bytes]) -> bytes | bytearray:
    joined = JoinedFragments()
    for part in parts:
        joined.add(part)
    return joined.join()


@pytest.mark.parametrize("size", [0, 1, JOINED_BYTES, JOINED_BYTES + 1, 3 * JOINED_BYTES])
def test_what_arrives_in_fragments_is_what_was_sent(size: int) -> None:
    content = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
    sent = split_message([content[:100], content[100:]])
    parts = [sent] if isinstance(sent, bytes) else [bytes(part) for part in sent]
    assert join(parts) == content
    assert all(len(part) <= FRAGMENT for part in parts)


def test_a_large_message_grows_in_place() -> None:
    large = join([b"a" * JOINED_BYTES, b"b", b"c"])
    assert isinstance(large, bytearray)
    assert large[-2:] == b"bc"
    assert isinstance(join([b"a", b"b"]), bytes)
