"""Tensors to bytes and back: the layout byte by byte, and bytes that lie."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping

import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from splitonnx.codecs import decode_metadata, decode_tensors, encode_tensors, measure_encoded
from splitonnx.errors import FormatError
from splitonnx.tensors import DTYPES

LIMIT = 16 << 10

arrays = hnp.arrays(
    st.sampled_from(sorted(DTYPES.values(), key=str)),
    hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=5),
)


def join(tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> bytes:
    return b"".join(encode_tensors(tensors, metadata))


def forge(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(start: int, end: int, shape: object = (1,), dtype: object = "F32") -> dict[str, object]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def test_the_bytes_are_these() -> None:
    header = (
        b'{"__metadata__":{"k":"v"},'
        b'"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},'
        b'"b":{"dtype":"U8","shape":[1,3],"data_offsets":[8,11]}}'
    )
    header += b" " * (-(len(header) + 8) % 64)
    content = join(
        {"b": np.array([[1, 2, 3]], np.uint8), "a": np.array([1, -2], np.float32)}, {"k": "v"}
    )
    assert content == (
        struct.pack("<Q", len(header))
        + header
        + bytes.fromhex("0000803f000000c0")
        + b"\x01\x02\x03"
    )


@given(
    st.dictionaries(st.text(max_size=8), arrays, max_size=4),
    st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=2),
)
def test_what_is_encoded_comes_back(
    tensors: dict[str, np.ndarray], metadata: dict[str, str]
) -> None:
    tensors.pop("__metadata__", None)
    found, described = decode_tensors(join(tensors, metadata), max_header=LIMIT)
    assert described == metadata
    assert found.keys() == tensors.keys()
    for name, array in tensors.items():
        assert found[name].dtype == array.dtype
        assert found[name].shape == array.shape
        assert found[name].tobytes() == array.tobytes()


@given(st.dictionaries(st.text("abc", min_size=1, max_size=3), arrays, min_size=1, max_size=3))
def test_the_safetensors_library_reads_and_writes_the_same(tensors: dict[str, np.ndarray]) -> None:
    theirs = safetensors.numpy.load(join(tensors))
    ours, _ = decode_tensors(safetensors.numpy.save(tensors), max_header=LIMIT)
    for name, array in tensors.items():
        assert theirs[name].tobytes() == ours[name].tobytes() == array.tobytes()
        assert theirs[name].shape == ours[name].shape == array.shape


def test_tensors_are_views_and_cannot_be_written_to() -> None:
    content = join({"x": np.arange(4, dtype=np.float32)})
    found, _ = decode_tensors(content, max_header=LIMIT)
    assert not found["x"].flags.owndata
    with pytest.raises(ValueError, match="read-only"):
        found["x"][0] = 1


def test_an_element_type_that_cannot_travel_is_refused() -> None:
    with pytest.raises(FormatError, match="complex64"):
        encode_tensors({"x": np.zeros(2, np.complex64)})


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not a header"),
        (b"\x01\x00", "not a header"),
        (struct.pack("<Q", 2**63) + b"{}", "over the limit"),
        (struct.pack("<Q", 50) + b"{}", "cut short"),
        (forge(b"nonsense"), "not a JSON object"),
        (forge(b"\xff\xfe"), "not a JSON object"),
        (forge(b'{"a":' + b"[" * 9000), "not JSON"),
        (forge(b' {"a":{}}'), "not a JSON object"),
        (forge(b""), "not a JSON object"),
        (forge(b"{}{}"), "not JSON"),
        (forge(b'{"a":{"dtype":"U8","dtype":"U8"}}'), "twice"),
        (forge(b"[]"), "not a JSON object"),
        (forge(b'{"__metadata__":{"k":"\\ud800"}}'), "not JSON"),
        (forge(b'{"\\udfff":{}}'), "not JSON"),
        (forge(b'{"a":{},"a":{}}'), "twice"),
        (forge({"__metadata__": {"k": 1}}), "metadata"),
        (forge({"a": 3}), "offsets"),
        (forge({"a": {"dtype": "F32", "shape": [1]}}), "offsets"),
        (forge({"a": entry(0, 4)}), "ends at byte 4 of 0"),
        (forge({"a": entry(4, 8)}, bytes(8)), "starts at byte 4"),
        (forge({"a": entry(0, 4), "b": entry(2, 6)}, bytes(8)), "starts at byte 2"),
        (forge({"a": entry(0, 4), "b": entry(0, 4)}, bytes(8)), "starts at byte 0 instead of 4"),
        (forge({"a": entry(0, 4), "b": entry(5, 9)}, bytes(9)), "starts at byte 5 instead of 4"),
        (forge({"a": entry(-4, 0)}, bytes(4)), "offsets"),
        (forge({"a": entry(4, 0)}, bytes(4)), "starts at byte 4"),
        (forge({"a": {**entry(0, 4), "data_offsets": [0, 4, 8]}}, bytes(4)), "offsets"),
        (forge({"a": {**entry(0, 4), "data_offsets": [0.0, 4]}}, bytes(4)), "offsets"),
        (forge({"a": entry(0, 4)}, bytes(3)), "ends at byte 4 of 3"),
        (forge({}, b"\x00"), "1 bytes follow"),
        (forge({"a": entry(0, 4)}, bytes(5)), "1 bytes follow"),
        (forge({"a": entry(0, 4, [2])}, bytes(4)), "instead of 8"),
        (forge({"a": entry(0, 4, [2**40, 2**40])}, bytes(4)), "no memory"),
        (forge({"a": entry(0, 4, [2**40, 2**10])}, bytes(4)), "takes 4 bytes"),
        (forge({"a": entry(0, 0, [0, 2**62, 2**62])}), "no memory"),
        (forge({"a": entry(0, 0, [2**63 - 1, 0])}), "no memory"),
        (forge({"a": entry(0, 0, [0, 2**63])}), "no valid shape"),
        (forge({"a": entry(0, 2, [2], "BOOL")}, b"\x01\x02"), "neither 0 nor 1"),
        (forge({"a": entry(0, 4, [-1])}, bytes(4)), "no valid shape"),
        (forge({"a": entry(0, 4, [10**4000, 10**4000])}, bytes(4)), "no valid shape"),
        (forge({"a": entry(0, 10**4000)}, bytes(4)), "no valid offsets"),
        (forge({"a": entry(0, 4, [True])}, bytes(4)), "no valid shape"),
        (forge({"a": entry(0, 4, [1.0])}, bytes(4)), "no valid shape"),
        (forge({"a": entry(0, 4, [1] * 40)}, bytes(4)), "no valid shape"),
        (forge({"a": entry(0, 4, [1], "F128")}, bytes(4)), "unknown element type"),
        (forge({"a": entry(0, 4, [1], ["F32"])}, bytes(4)), "unknown element type"),
        (forge({"a": {**entry(0, 4), "more": 1}}, bytes(4)), "fields"),
        (forge(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}'), "not JSON"),
    ],
)
def test_bytes_that_lie_are_refused(content: bytes, reason: str) -> None:
    with pytest.raises(FormatError, match=reason):
        decode_tensors(content, max_header=LIMIT)


def test_the_header_may_take_just_the_limit() -> None:
    content = join({"x": np.zeros(1, np.float32)})
    (length,) = struct.unpack("<Q", content[:8])
    decode_tensors(content, max_header=length)
    with pytest.raises(FormatError, match="over the limit"):
        decode_tensors(content, max_header=length - 1)


def test_what_bytes_say_of_themselves_fits_one_line_of_the_refusal() -> None:
    name = "\x1b[2J\n" * 2000
    with pytest.raises(FormatError) as caught:
        decode_tensors(forge({name: entry(0, 4, dtype="F128")}, bytes(4)), max_header=LIMIT)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 500


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(content: bytes) -> None:
    try:
        decode_tensors(content, max_header=LIMIT)
    except FormatError:
        return


@given(st.integers(0, 400), st.integers(0, 255))
def test_one_altered_byte_is_read_or_refused(place: int, value: int) -> None:
    content = bytearray(join({"x": np.arange(9, dtype=np.int64), "y": np.ones((2, 3), np.float32)}))
    content[place % len(content)] = value
    try:
        decode_tensors(content, max_header=LIMIT)
    except FormatError:
        return


def test_metadata_are_decoded_without_the_tensors() -> None:
    content = join({"a": np.zeros(3, np.float32)}, {"step": "3"})
    header = content[: 8 + int.from_bytes(content[:8], "little")]
    for beginning in (content, header, header + b"\0"):
        assert decode_metadata(beginning, max_header=LIMIT) == {"step": "3"}
    assert decode_metadata(join({}), max_header=LIMIT) == {}


@pytest.mark.parametrize(
    "content",
    [b"", b"\0" * 8, forge({})[:-1], forge({"__metadata__": {"step": 3}}), forge([]), b"\xff" * 90],
)
def test_a_beginning_without_a_header_has_no_metadata(content: bytes) -> None:
    with pytest.raises(FormatError):
        decode_metadata(content, max_header=LIMIT)


def test_a_header_tells_the_size_of_its_message() -> None:
    tensors: dict[str, np.ndarray]
    tensors = {"a": np.zeros((3, 5), np.float32), "b": np.zeros(0, np.int64), "c": np.ones(7, "b")}
    for names in ("abc", ""):
        sent = {name: tensors[name] for name in names}
        head, *rest = encode_tensors(sent, {"kind": "test"})
        size = len(head) + sum(map(len, rest))
        assert measure_encoded(head, max_header=1000) == size
        assert measure_encoded(b"".join([head, *rest]), max_header=1000) == size
        assert measure_encoded(head[:-1], max_header=1000) is None
        assert measure_encoded(head, max_header=10) is None


@pytest.mark.parametrize(
    "entry", [{}, {"data_offsets": [0, -1]}, {"data_offsets": [0, 2**63]}, {"data_offsets": 5}, 5]
)
def test_a_header_without_valid_offsets_tells_no_size(entry: object) -> None:
    text = json.dumps({"x": entry}).encode()
    assert measure_encoded(struct.pack("<Q", len(text)) + text, max_header=1000) is None
