"""The tables of ONNX's messages, held against the onnx package's own."""

from __future__ import annotations

import numpy as np
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from onnx import (
    AttributeProto,
    GraphProto,
    ModelProto,
    NodeProto,
    OperatorSetIdProto,
    StringStringEntryProto,
    TensorProto,
    TensorShapeProto,
    TypeProto,
    ValueInfoProto,
    helper,
)

from splitonnx.runtime.gate import schemas
from splitonnx.runtime.gate.protobufs import Table, WireType

MESSAGES = {
    "model": (schemas.MODEL, ModelProto.DESCRIPTOR),
    "opset": (schemas.OPSET, OperatorSetIdProto.DESCRIPTOR),
    "pair": (schemas.PAIR, StringStringEntryProto.DESCRIPTOR),
    "graph": (schemas.GRAPH, GraphProto.DESCRIPTOR),
    "node": (schemas.NODE, NodeProto.DESCRIPTOR),
    "attribute": (schemas.ATTRIBUTE, AttributeProto.DESCRIPTOR),
    "tensor": (schemas.TENSOR, TensorProto.DESCRIPTOR),
    "value": (schemas.VALUE, ValueInfoProto.DESCRIPTOR),
    "type": (schemas.TYPE, TypeProto.DESCRIPTOR),
    "tensor type": (schemas.TENSOR_TYPE, TypeProto.Tensor.DESCRIPTOR),
    "shape": (schemas.SHAPE, TensorShapeProto.DESCRIPTOR),
    "dimension": (schemas.DIMENSION, TensorShapeProto.Dimension.DESCRIPTOR),
}
NUMBERS = {
    FieldDescriptor.TYPE_INT32,
    FieldDescriptor.TYPE_INT64,
    FieldDescriptor.TYPE_UINT64,
    FieldDescriptor.TYPE_ENUM,
}
WIRES = {
    FieldDescriptor.TYPE_FLOAT: WireType.FIXED32,
    FieldDescriptor.TYPE_DOUBLE: WireType.FIXED64,
}


def find_wires(field: FieldDescriptor) -> set[WireType]:
    """Find how ONNX's own writer may write a field: repeated numbers in either of two ways."""
    wire = WireType.NUMBER if field.type in NUMBERS else WIRES.get(field.type, WireType.BYTES)
    is_packable = field.is_repeated and wire is not WireType.BYTES
    return {wire, WireType.BYTES} if is_packable else {wire}


@pytest.mark.parametrize("kind", MESSAGES)
def test_a_field_is_written_as_onnx_writes_it_and_repeated_where_onnx_repeats_it(kind: str) -> None:
    table, descriptor = MESSAGES[kind]
    for tag, (name, single, width, refusal) in table.fields.items():
        field = descriptor.fields_by_number[tag >> 3]
        assert WireType(tag & 7) in find_wires(field), (name, field.name)
        assert width == {WireType.FIXED32: 4, WireType.FIXED64: 8}.get(WireType(tag & 7), 0)
        assert refusal or field.is_repeated == (single == 0), (name, field.name)


@pytest.mark.parametrize("kind", MESSAGES)
def test_what_onnx_may_write_in_one_field_in_two_ways_is_known_in_both(kind: str) -> None:
    table, descriptor = MESSAGES[kind]
    known = set(table.fields)
    for number in {tag >> 3 for tag in known}:
        field = descriptor.fields_by_number[number]
        assert {number << 3 | wire for wire in find_wires(field)} <= known, field.name


def refusal(table: Table, number: int) -> str:
    return next(entry[3] for tag, entry in table.fields.items() if tag >> 3 == number)


def number(descriptor: Descriptor, name: str) -> int:
    found: int = descriptor.fields_by_name[name].number
    return found


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("model", "functions"),
        ("model", "training_info"),
        ("graph", "sparse_initializer"),
        ("node", "overload"),
        ("attribute", "ref_attr_name"),
        ("attribute", "sparse_tensor"),
        ("attribute", "sparse_tensors"),
        ("tensor", "segment"),
        ("type", "map_type"),
        ("type", "sparse_tensor_type"),
    ],
)
def test_what_brings_code_or_structure_of_its_own_is_refused_with_a_reason(
    kind: str, name: str
) -> None:
    table, descriptor = MESSAGES[kind]
    assert refusal(table, number(descriptor, name))


def test_external_data_are_read_so_that_the_gate_can_say_which_tensor_names_them() -> None:
    fields = [schemas.TENSOR.fields[tag] for tag in (13 << 3 | 2, 14 << 3)]
    assert [(name, refusal) for name, _, _, refusal in fields] == [
        ("external_data", ""),
        ("location", ""),
    ]


NUMPY = {
    kind: helper.tensor_dtype_to_np_dtype(kind)
    for kind in schemas.DTYPES
    if kind not in (schemas.STRINGS, TensorProto.INT4, TensorProto.UINT4)
}


@pytest.mark.parametrize("kind", NUMPY)
def test_an_element_is_as_wide_as_numpy_s(kind: int) -> None:
    assert schemas.DTYPES[kind][0] == np.dtype(NUMPY[kind]).itemsize * 8


def test_half_bytes_are_half_and_strings_have_no_width() -> None:
    assert {schemas.DTYPES[kind][0] for kind in (TensorProto.INT4, TensorProto.UINT4)} == {4}
    assert schemas.DTYPES[schemas.STRINGS][0] == 0


@pytest.mark.parametrize("kind", schemas.DTYPES)
def test_values_stand_in_the_field_where_onnx_writes_them(kind: int) -> None:
    assert schemas.DTYPES[kind][1] == helper.tensor_dtype_to_field(kind)


def test_complex_numbers_are_those_of_two_values_an_element() -> None:
    assert {TensorProto.COMPLEX64, TensorProto.COMPLEX128} == schemas.COMPLEX
