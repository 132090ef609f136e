"""From a fuzzer's bytes to bytes that are worth reading.

A length that does not fit what follows it ends every reader at once, and a fuzzer that changes one
byte rarely changes the right length with it.  So most inputs are programs from which these
functions make bytes whose lengths fit; the first byte of an input says which.
"""

from __future__ import annotations

import json
import struct

NESTED = 0xF0
"""In place of a length: a message follows, up to :data:`END`."""
END = 0xFF


def frame_tensors(content: bytes) -> bytes:
    """A header up to the first null byte, then the tensors' bytes; or all as it is."""
    mode, content = content[:1], content[1:]
    if mode == b"r":
        return content
    header, _, data = content.partition(b"\0")
    return _put_length(header) + data


def frame_message(content: bytes) -> bytes:
    """A message's JSON, a null byte, the entries of its tensors, a null byte, their bytes."""
    mode, content = content[:1], content[1:]
    if mode in (b"r", b"h"):
        return frame_tensors(mode + content)
    text, _, rest = content.partition(b"\0")
    entries, _, data = rest.partition(b"\0")
    field = json.dumps(text.decode(errors="replace"), ensure_ascii=False).encode()
    comma = b"," if entries else b""
    return (
        _put_length(b'{"__metadata__":{"splitonnx":' + field + b"}" + comma + entries + b"}") + data
    )


def frame_protobuf(content: bytes) -> bytes:
    """A program of tags and values: bytes have their length in one byte, or nest.

    See :func:`corpora.write_program` for the way there.
    """
    mode, content = content[:1], content[1:]
    if mode == b"r":
        return content
    open_messages: list[bytearray] = [bytearray()]
    tags: list[int] = []
    at = 0
    while at < len(content):
        tag = content[at]
        at += 1
        if tag == END:
            if tags:
                _close(open_messages, tags)
            continue
        if tag & 7 != 2 or at == len(content):
            width = {1: 8, 5: 4}.get(tag & 7) or _count_number(content, at)
            open_messages[-1] += bytes([*_number(tag), *content[at : at + width]])
            at += width
            continue
        length = content[at]
        at += 1
        if length >= NESTED:
            tags.append(tag)
            open_messages.append(bytearray())
        else:
            text = content[at : at + length]
            at += length
            open_messages[-1] += bytes([*_number(tag), *_number(len(text))]) + text
    while tags:
        _close(open_messages, tags)
    return bytes(open_messages[0])


def _close(open_messages: list[bytearray], tags: list[int]) -> None:
    inner, tag = open_messages.pop(), tags.pop()
    open_messages[-1] += bytes([*_number(tag), *_number(len(inner))]) + inner


def _number(value: int) -> list[int]:
    """Write a base-128 number.  A tag of one byte above 127 stands for a field above 15."""
    digits = []
    while value > 127:
        digits.append(value & 127 | 128)
        value >>= 7
    return [*digits, value]


def _count_number(content: bytes, at: int) -> int:
    size = 1
    while at + size <= len(content) and content[at + size - 1] > 127 and size < 12:
        size += 1
    return size


def _put_length(header: bytes) -> bytes:
    return struct.pack("<Q", len(header)) + header
