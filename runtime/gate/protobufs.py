"""A strict parser for Protocol Buffers, which reads a message field by field.

It accepts only what serializers write.  It refuses a message if a field or its wire type is not in
the caller's table, if a field that may occur only once occurs twice (parsers differ in how they
merge such fields), if it contains a group, if a number has more than 64 bits, or if a length
exceeds the message.  Nothing is copied or stored: each field is returned as its number or as the
position of its bytes.
(Format: protobuf.dev/programming-guides/encoding.)

This module knows nothing about ONNX; the caller decides which fields contain which messages.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from enum import IntEnum
from typing import NamedTuple

import numpy as np

Place = tuple[int, int]
"""The start and end of a range of bytes."""

_ENDLESS = re.compile(rb"[\x80-\xff]{10}")
_UNKNOWN = "field {} of {} (wire type {}) is not one that a bundle's graphs have"


class Malformed(ValueError):
    """Raised if bytes are not a message of the expected kind; the text gives the reason."""


class WireType(IntEnum):
    """The encodings of a field, called wire types in Protocol Buffers; groups are not supported."""

    NUMBER = 0
    FIXED64 = 1
    BYTES = 2
    FIXED32 = 5


_WIDTHS: Mapping[WireType, int] = {WireType.FIXED64: 8, WireType.FIXED32: 4}
"""The number of bytes that a field takes, for encodings with a fixed size."""


class Field(NamedTuple):
    """A field that a message may have: its name, number and encoding.

    ``repeated`` is true if the field may occur several times in a message.  ``refusal`` is the
    reason why the field is forbidden, or empty if it is allowed.
    """

    name: str
    number: int
    wire: WireType = WireType.BYTES
    repeated: bool = False
    refusal: str = ""


class Table(NamedTuple):
    """The fields that one kind of message may have.

    ``fields`` maps each tag (field number and encoding) to four values: the field's name, the bit
    that marks it as seen (0 for repeated fields), its fixed size in bytes (or 0), and the reason
    why it is forbidden (or an empty string).
    """

    kind: str
    fields: Mapping[int, tuple[str, int, int, str]]


def make_table(kind: str, *fields: Field) -> Table:
    """Build the table that :meth:`Reader.read` needs for one kind of message.

    ``kind`` is what error texts call the message, and ``fields`` are the fields that it may have.
    """
    return Table(
        kind,
        {
            field.number << 3 | field.wire: (
                field.name,
                0 if field.repeated else 1 << field.number,
                _WIDTHS.get(field.wire, 0),
                field.refusal,
            )
            for field in fields
        },
    )


class Reader:
    """A reader for the messages in ``content``; it reads at most ``max_fields`` fields in total."""

    def __init__(self, content: bytes, *, max_fields: int) -> None:
        self.content = content
        self._left = max_fields

    def read(self, place: Place, table: Table) -> Iterator[tuple[str, int, int]]:
        """Yield the fields of a message one after the other.

        ``place`` is where the message's bytes start and stop, and ``table`` lists the fields that
        the message may have.  A number is yielded as ``(name, number, 0)``, and any other field as
        ``(name, start, stop)``, where ``start`` and ``stop`` delimit the field's bytes.

        Raises:
            Malformed: the bytes at ``place`` are not a message of this kind.
        """
        content, fields = self.content, table.fields
        at, stop = place
        seen = 0
        while at < stop:
            tag = content[at]
            at += 1
            if tag > 127:
                tag, at = self._read_number(at - 1, stop)
            found = fields.get(tag)
            if found is None:
                raise Malformed(_UNKNOWN.format(tag >> 3, table.kind, tag & 7))
            name, bit, width, refusal = found
            if refusal:
                raise Malformed(refusal)
            if seen & bit:
                raise Malformed(f"a {table.kind} has its {name} twice")
            seen |= bit
            self._left -= 1
            if self._left < 0:
                raise Malformed("it has more fields than any graph of a bundle")
            if width:
                end = at + width
            elif at < stop and content[at] < 128:  # most are shorter, and a call is slow
                value = content[at]
                at += 1
                end = at + value
            else:
                value, at = self._read_number(at, stop)
                end = at + value
            if not tag & 7:
                yield name, value, 0
                continue
            if end > stop:
                raise Malformed(f"the {name} of a {table.kind} is cut short")
            yield name, at, end
            at = end

    def read_numbers(self, place: Place) -> Iterator[int]:
        """Yield the numbers of a packed field.

        Raises:
            Malformed: a number is incomplete or has more than 64 bits.
        """
        at, stop = place
        while at < stop:
            value, at = self._read_number(at, stop)
            yield value

    def count_numbers(self, place: Place) -> int:
        """Count the numbers of a packed field without decoding each of them.

        Raises:
            Malformed: a number is incomplete or has more than 64 bits.
        """
        start, stop = place
        if start == stop:
            return 0
        if self.content[stop - 1] > 127 or _ENDLESS.search(self.content, start, stop):
            raise Malformed("a list of numbers is cut short")
        return int(np.count_nonzero(self._view(place) < 128))

    def read_text(self, place: Place, most: int) -> str:
        """Read a single line of text of at most ``most`` bytes.

        Raises:
            Malformed: the text is longer, not UTF-8, or contains control characters.
        """
        start, stop = place
        if stop - start > most:
            raise Malformed(f"a name of {stop - start} bytes is in it")
        try:
            text = self.content[start:stop].decode()
        except UnicodeDecodeError as error:
            raise Malformed("a name in it is not UTF-8") from error
        if not text.isprintable():
            raise Malformed("a name in it holds control characters")
        return text

    def _view(self, place: Place) -> np.ndarray:
        start, stop = place
        return np.frombuffer(self.content, np.uint8, stop - start, start)

    def _read_number(self, at: int, stop: int) -> tuple[int, int]:
        """Read a number in base-128 encoding, and return it with the position after it."""
        content = self.content
        value = shift = 0
        while at < stop:
            byte = content[at]
            at += 1
            if byte < 128:
                value |= byte << shift
                if value >> 64:
                    break
                return value, at
            value |= (byte & 127) << shift
            shift += 7
            if shift > 63:
                break
        else:
            raise Malformed("it is cut short within a number")
        raise Malformed("it holds a number of more than 64 bits")


def to_signed(value: int) -> int:
    """Convert an unsigned 64-bit number to the signed number with the same bits."""
    return value - (1 << 64) if value >> 63 else value
