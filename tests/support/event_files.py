"""Read TensorBoard's event files by their format, without the library that writes them.

A file is a sequence of records: length, its checksum, data, and theirs; a checksum is a masked
CRC-32C.  The data are an ``Event`` as a protobuf message.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path


def read_scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Map each tag to its values by step, without those that a later file declares obsolete."""
    found: dict[str, dict[int, float]] = {}
    for path in sorted(folder.glob("events.out.tfevents.*"), key=lambda path: path.suffix):
        for record in _read_records(path.read_bytes()):
            event = dict(_read_fields(record))
            step = _as_integer(event.get(2, 0))
            if 7 in event:  # a session begins: what was at this step or later is obsolete
                for values in found.values():
                    for later in [known for known in values if known >= step]:
                        del values[later]
            if isinstance(summary := event.get(5), bytes):
                for _, value in _read_fields(summary):
                    assert isinstance(value, bytes)
                    scalar = dict(_read_fields(value))
                    tag, number = scalar[1], scalar[2]
                    assert isinstance(tag, bytes)
                    assert isinstance(number, float)
                    values = found.setdefault(tag.decode(), {})
                    assert step not in values, "a step has two values"
                    values[step] = number
    return found


def _as_integer(value: object) -> int:
    assert isinstance(value, int)
    return value


def _read_records(content: bytes) -> Iterator[bytes]:
    place = 0
    while place < len(content):
        size, size_sum = struct.unpack_from("<QI", content, place)
        assert size_sum == _mask(_sum_up(content[place : place + 8]))
        record = content[place + 12 : place + 12 + size]
        (record_sum,) = struct.unpack_from("<I", content, place + 12 + size)
        assert record_sum == _mask(_sum_up(record))
        yield record
        place += 16 + size


def _sum_up(content: bytes) -> int:
    """Compute the CRC-32C, bit by bit."""
    crc = 0xFFFFFFFF
    for byte in content:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def _mask(crc: int) -> int:
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def _read_fields(content: bytes) -> Iterator[tuple[int, int | float | bytes]]:
    place = 0
    while place < len(content):
        key, place = _read_varint(content, place)
        kind = key & 7
        value: int | float | bytes
        if kind == 0:
            value, place = _read_varint(content, place)
        elif kind == 2:
            size, place = _read_varint(content, place)
            value, place = content[place : place + size], place + size
        else:
            form, size = ("<d", 8) if kind == 1 else ("<f", 4)
            (value,), place = struct.unpack_from(form, content, place), place + size
        yield key >> 3, value


def _read_varint(content: bytes, place: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = content[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return value, place
