"""Reading Protocol Buffers by hand, held against protobuf's own writer."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto

from splitonnx.runtime.gate.protobufs import (
    Field,
    Malformed,
    Reader,
    Table,
    WireType,
    make_table,
    to_signed,
)

TABLE = make_table(
    "sample",
    Field("number", 1, WireType.NUMBER),
    Field("text", 2),
    Field("texts", 3, repeated=True),
    Field("real", 4, WireType.FIXED32),
    Field("double", 5, WireType.FIXED64),
    Field("secret", 6, refusal="it has a secret"),
)
TENSOR = make_table(
    "tensor",
    Field("dims", 1, repeated=True),
    Field("dims", 1, WireType.NUMBER, repeated=True),
    Field("dtype", 2, WireType.NUMBER),
    Field("int64_data", 7, repeated=True),
    Field("name", 8),
    Field("raw_data", 9),
)


def read(content: bytes, table: Table = TABLE, fields: int = 100) -> list[tuple[str, int, int]]:
    return list(Reader(content, max_fields=fields).read((0, len(content)), table))


def test_fields_are_given_in_order_as_numbers_or_as_places() -> None:
    content = b"\x08\x96\x01" + b"\x12\x02hi" + b"\x1a\x01a" + b"\x1a\x00"
    assert read(content) == [
        ("number", 150, 0),
        ("text", 5, 7),
        ("texts", 9, 10),
        ("texts", 12, 12),
    ]
    assert content[5:7] == b"hi"


def test_fixed_fields_are_given_as_the_place_of_their_bytes() -> None:
    content = b"\x25" + struct.pack("<f", 1.5) + b"\x29" + struct.pack("<d", 2.5)
    assert read(content) == [("real", 1, 5), ("double", 6, 14)]


@given(
    dims=st.lists(st.integers(0, 2**40), max_size=5),
    values=st.lists(st.integers(-(2**63), 2**63 - 1), max_size=5),
    name=st.text(st.characters(codec="ascii", categories=["L", "N"]), max_size=200),
    raw=st.binary(max_size=300),
)
def test_what_protobuf_s_own_writer_writes_is_read_back(
    dims: list[int], values: list[int], name: str, raw: bytes
) -> None:
    tensor = TensorProto(dims=dims, data_type=7, int64_data=values, name=name, raw_data=raw)
    content: bytes = tensor.SerializeToString()
    reader = Reader(content, max_fields=100)
    found: dict[str, object] = {}
    read_dims: list[int] = []
    for field, start, stop in reader.read((0, len(content)), TENSOR):
        if field == "dims":
            read_dims += reader.read_numbers((start, stop)) if stop else [start]
        elif field == "int64_data":
            assert reader.count_numbers((start, stop)) == len(values)
            found[field] = [to_signed(value) for value in reader.read_numbers((start, stop))]
        elif field == "dtype":
            found[field] = start
        elif field == "name":
            found[field] = reader.read_text((start, stop), 1000)
        else:
            found[field] = content[start:stop]
    assert read_dims == dims
    assert found.get("int64_data", []) == values
    assert found["dtype"] == 7
    assert found.get("name", "") == name
    assert found.get("raw_data", b"") == raw


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\x08\x01\x08\x02", "a sample has its number twice"),
        (b"\x12\x00\x12\x00", "a sample has its text twice"),
        (b"\x32\x00", "it has a secret"),
        (b"\x3a\x00", "field 7 of sample .wire type 2"),
        (b"\x0a\x00", "field 1 of sample .wire type 2"),
        (b"\x12\x05ab", "text of a sample is cut short"),
        (b"\x25\x00\x00", "real of a sample is cut short"),
        (b"\x08\x80", "within a number"),
        (b"\x08" + b"\xff" * 9 + b"\x02", "more than 64 bits"),
    ],
)
def test_what_parsers_would_read_each_in_its_own_way_is_refused(
    content: bytes, reason: str
) -> None:
    with pytest.raises(Malformed, match=reason):
        read(content)


def test_the_largest_number_is_of_64_bits() -> None:
    assert read(b"\x08" + b"\xff" * 9 + b"\x01") == [("number", 2**64 - 1, 0)]


def test_a_message_s_end_is_its_place_s_and_not_the_content_s() -> None:
    content = b"\x12\x05hello"
    with pytest.raises(Malformed, match="cut short"):
        list(Reader(content, max_fields=9).read((0, 4), TABLE))


def test_fields_are_counted_over_all_messages_of_one_content() -> None:
    content = b"\x1a\x00" * 3
    reader = Reader(content, max_fields=5)
    assert len(list(reader.read((0, 6), TABLE))) == 3
    with pytest.raises(Malformed, match="more fields"):
        list(reader.read((0, 6), TABLE))


@pytest.mark.parametrize(
    ("content", "count"), [(b"", 0), (b"\x01", 1), (b"\x80\x01\x05", 2), (b"\xff" * 9 + b"\x01", 1)]
)
def test_numbers_are_counted_as_they_are_read(content: bytes, count: int) -> None:
    reader = Reader(content, max_fields=1)
    place = (0, len(content))
    assert reader.count_numbers(place) == len(list(reader.read_numbers(place))) == count


@pytest.mark.parametrize("content", [b"\x80", b"\x01\xff", b"\x80" * 10 + b"\x01"])
def test_numbers_without_an_end_are_neither_counted_nor_read(content: bytes) -> None:
    reader = Reader(content, max_fields=1)
    with pytest.raises(Malformed):
        reader.count_numbers((0, len(content)))
    with pytest.raises(Malformed):
        list(reader.read_numbers((0, len(content))))


@pytest.mark.parametrize(
    ("text", "reason"),
    [(b"\xff", "not UTF-8"), (b"a\nb", "control characters"), (b"abcdef", "a name of 6 bytes")],
)
def test_a_text_that_no_line_can_hold_is_refused(text: bytes, reason: str) -> None:
    with pytest.raises(Malformed, match=reason):
        Reader(text, max_fields=1).read_text((0, len(text)), 5)


def test_a_number_is_signed_by_its_64th_bit() -> None:
    assert [to_signed(n) for n in (0, 2**63 - 1, 2**63, 2**64 - 1)] == [0, 2**63 - 1, -(2**63), -1]
