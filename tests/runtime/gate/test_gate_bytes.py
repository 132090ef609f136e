"""The gate and bytes that no serializer writes: what is refused, and what parsers agree on."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from splitonnx.errors import ForbiddenGraph
from splitonnx.operators import STANDARD_OPERATORS, TRAINING_OPERATORS
from splitonnx.runtime.gate.gates import check_graph
from tests.support.spoiled_graphs import EXTERNAL, FLOAT, hold, nest, refuse, spoil, write


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "IR version 0"),
        (b"\x08", "within a number"),
        (b"\x08" + b"\xff" * 9, "within a number"),
        (b"\x08" + b"\xff" * 10 + b"\x01", "more than 64 bits"),
        (b"\x08" + b"\xff" * 9 + b"\x02", "more than 64 bits"),
        (b"\x08\x0a\x08\x0a", "ir_version twice"),
        (b"\x08\x0a\x3a\x00\x3a\x00", "graph twice"),  # a parser would merge them
        (b"\x3a", "within a number"),
        (b"\x3a\x05ab", "graph of a model is cut short"),
        (b"\x3a\xff\xff\xff\xff\x0f", "graph of a model is cut short"),
        (b"\x3a" + b"\xff" * 9 + b"\x01", "graph of a model is cut short"),
        (b"\x0a\x01\x0a", "field 1 of model .wire type 2"),
        (b"\x09" + bytes(8), "field 1 of model .wire type 1"),
        (b"\x0d" + bytes(4), "field 1 of model .wire type 5"),
        (b"\x0b\x0c", "field 1 of model .wire type 3"),  # a group
        (b"\x0c", "wire type 4"),
        (b"\x0f", "wire type 7"),
        (b"\x00\x00", "field 0"),
        (b"\x98\x06\x01", "field 99"),
        (b"\xff" * 40, "more than 64 bits"),
        (b"\x08\x0a\x12\x01\xff", "not UTF-8"),
        (b"\x12\x06ggORTM\x08\x0a", "own format"),
        (b"\x08\x0a\x42\x02\x10\x12\x3a\x04\x2a\x02\x25\x00", "cut short"),  # half a float
        (b"\x08\x0a\x42\x02\x10\x12\x3a\x05\x2a\x03\x3a\x01\xff", "cut short"),  # half a number
        (
            b"\x08\x0a\x42\x02\x10\x12\x3a\x0f\x2a\x0d\x3a\x0b" + b"\xff" * 10 + b"\x00",
            "cut short",
        ),
        (b"\x08\x0a\x42\x02\x10\x12\x3a\x04\x0a\x02\x2a\x00", "''"),
        (b"\x08\x0a\x42\x02\x10\x12\x3a\x0a\x0a\x08\x22\x02Or\x2a\x02\x18\x01", "come first"),
    ],
)
def test_bytes_that_are_no_message_are_refused(content: bytes, reason: str) -> None:
    refuse(content, reason)


def test_the_smallest_graph_is_these_bytes() -> None:
    check_graph("s", b"\x08\x0a\x42\x02\x10\x12\x3a\x00")


def test_numbers_may_be_packed_or_not() -> None:
    def frame(tensor: bytes) -> bytes:
        graph = b"\x2a" + bytes([len(tensor)]) + tensor
        return b"\x08\x0a\x42\x02\x10\x12\x3a" + bytes([len(graph)]) + graph

    whole = b"\x10\x07"  # I64
    check_graph("s", frame(whole + b"\x08\x01\x08\x02\x38\x05\x38\x06"))
    check_graph("s", frame(whole + b"\x0a\x02\x01\x02\x3a\x0b\x05" + b"\xff" * 9 + b"\x01"))
    refuse(frame(whole + b"\x0a\x02\x01\x02\x3a\x01\x05"), "2 values, but holds 1")
    real = b"\x10\x01\x08\x01"  # F32, one element
    check_graph("s", frame(real + b"\x25" + struct.pack("<f", 1)))
    check_graph("s", frame(real + b"\x22\x04" + struct.pack("<f", 1)))


def test_every_beginning_of_a_graph_is_refused() -> None:
    content = spoil(lambda _: None)
    for end in range(len(content)):
        with pytest.raises(ForbiddenGraph):
            check_graph("s", content[:end])


def frame(tag: int, content: bytes) -> bytes:
    """Write a field of bytes."""
    length, size = len(content), bytearray()
    while length > 127:
        size.append(length & 127 | 128)
        length >>= 7
    return bytes([tag, *size, length]) + content


def test_bodies_and_types_nested_by_the_thousand_are_refused_without_recursion() -> None:
    head = b"\x08\x0a\x42\x02\x10\x12"
    body = kind = b""
    for _ in range(5000):
        attribute = frame(0x0A, b"body") + frame(0x32, body)
        body = frame(0x0A, frame(0x22, b"Loop") + frame(0x2A, attribute))
        kind = frame(0x22, frame(0x0A, kind))
    refuse(head + frame(0x3A, body), "nest over 32 deep")
    refuse(head + frame(0x3A, frame(0x5A, frame(0x12, kind))), "nests over 8 deep")


def test_a_field_that_stands_twice_is_refused_before_parsers_merge_it() -> None:
    tensor = TensorProto(name="t", data_type=FLOAT, dims=[1], raw_data=bytes(4))
    first = AttributeProto(name="value", type=AttributeProto.TENSOR, t=tensor).SerializeToString()
    second = AttributeProto(t=EXTERNAL).SerializeToString()
    node = NodeProto(op_type="Constant", output=["c"]).SerializeToString()
    merged = node + b"\x2a" + bytes([len(first + second)]) + first + second
    graph = b"\x0a" + bytes([len(merged)]) + merged
    refuse(
        b"\x08\x0a\x42\x02\x10\x12\x3a" + bytes([len(graph)]) + graph,
        "an attribute|a attribute has its tensor twice",
    )


CORPUS = [
    spoil(lambda _: None),
    write(nest(2)),
    hold(helper.make_tensor("t", 7, [3], [-1, 0, 1])),
    spoil(lambda model: model.graph.node[0].metadata_props.add(key="a", value="b")),
]


@given(st.binary(max_size=400))
def test_any_bytes_are_refused(content: bytes) -> None:
    assert_refused_or_harmless(content)


@settings(max_examples=600)
@given(
    st.sampled_from(CORPUS),
    st.lists(st.tuples(st.integers(0, 600), st.integers(0, 2), st.binary(max_size=4)), max_size=4),
)
def test_what_passes_means_the_same_to_a_parser(
    content: bytes, edits: list[tuple[int, int, bytes]]
) -> None:
    changed = bytearray(content)
    for place, removed, added in edits:
        place %= len(changed) + 1
        changed[place : place + removed] = added
    assert_refused_or_harmless(bytes(changed))


def assert_refused_or_harmless(content: bytes) -> None:
    """What passes, protobuf's own parser reads, and finds nothing that the gate should have."""
    try:
        check_graph("s", content)
    except ForbiddenGraph:
        return
    model = ModelProto.FromString(content)
    assert not model.functions
    assert not model.training_info
    assert {entry.domain for entry in model.opset_import} <= {"", "ai.onnx", "com.microsoft"}
    graphs = [model.graph]
    for graph in graphs:
        assert not graph.sparse_initializer
        tensors = [*graph.initializer]
        for node in graph.node:
            assert node.op_type in STANDARD_OPERATORS | TRAINING_OPERATORS
            for attribute in node.attribute:
                graphs += [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]
                tensors += [*attribute.tensors, *([attribute.t] if attribute.HasField("t") else [])]
        for tensor in tensors:
            assert not tensor.external_data
            assert tensor.data_location == TensorProto.DEFAULT
            if tensor.data_type not in (TensorProto.STRING, TensorProto.BFLOAT16):
                numpy_helper.to_array(tensor)
