"""The ONNX messages that a bundle's graphs may contain, as tables for :mod:`protobufs`.

A field is refused if its message's table either omits it or lists it with a reason to refuse it.
This includes fields of newer ONNX versions, and fields through which a graph could bring its own
functions or unusual structures.  The tables give the same name to all fields that the gate checks
in the same way, even if ONNX names them differently.  (Source: github.com/onnx/onnx,
onnx/onnx-ml.proto, IR version 10.)
"""

from __future__ import annotations

from collections.abc import Mapping

from splitonnx.runtime.gate.protobufs import Field, WireType, make_table

_NUMBER, _FIXED32, _FIXED64 = WireType.NUMBER, WireType.FIXED32, WireType.FIXED64
_NO_SPARSE = "it has a sparse tensor, which bundles never have"
_NO_FUNCTIONS = "it has functions of its own, which bundles never have"


def _list(wire: WireType, name: str, number: int) -> tuple[Field, Field]:
    """Return a repeated number field in both encodings: one number at a time, and packed."""
    return Field(name, number, wire, repeated=True), Field(name, number, repeated=True)


MODEL = make_table(
    "model",
    Field("ir_version", 1, _NUMBER),
    Field("producer", 2),
    Field("producer", 3),
    Field("domain", 4),
    Field("version", 5, _NUMBER),
    Field("text", 6),
    Field("graph", 7),
    Field("opset", 8, repeated=True),
    Field("metadata", 14, repeated=True),
    Field("training_info", 20, refusal="it has training info, which bundles never have"),
    Field("functions", 25, refusal=_NO_FUNCTIONS),
)
OPSET = make_table("opset", Field("domain", 1), Field("version", 2, _NUMBER))
PAIR = make_table("pair of texts", Field("key", 1), Field("value", 2))
GRAPH = make_table(
    "graph",
    Field("node", 1, repeated=True),
    Field("name", 2),
    Field("initializer", 5, repeated=True),
    Field("text", 10),
    Field("input", 11, repeated=True),
    Field("output", 12, repeated=True),
    Field("value", 13, repeated=True),
    Field("sparse_initializer", 15, refusal=_NO_SPARSE),
    Field("metadata", 16, repeated=True),
)
NODE = make_table(
    "node",
    Field("argument", 1, repeated=True),
    Field("result", 2, repeated=True),
    Field("name", 3),
    Field("operator", 4),
    Field("attribute", 5, repeated=True),
    Field("text", 6),
    Field("domain", 7),
    Field("overload", 8, refusal=_NO_FUNCTIONS),
    Field("metadata", 9, repeated=True),
)
ATTRIBUTE = make_table(
    "attribute",
    Field("name", 1),
    Field("floats", 2, _FIXED32),
    Field("integers", 3, _NUMBER),
    Field("string", 4),
    Field("tensor", 5),
    Field("graph", 6),
    *_list(_FIXED32, "floats", 7),
    *_list(_NUMBER, "integers", 8),
    Field("string", 9, repeated=True),
    Field("tensor", 10, repeated=True),
    Field("graph", 11, repeated=True),
    Field("text", 13),
    Field("type", 14),
    Field("type", 15, repeated=True),
    Field("kind", 20, _NUMBER),
    Field("reference", 21, refusal=_NO_FUNCTIONS),
    Field("sparse_tensor", 22, refusal=_NO_SPARSE),
    Field("sparse_tensors", 23, refusal=_NO_SPARSE),
)
TENSOR = make_table(
    "tensor",
    *_list(_NUMBER, "dims", 1),
    Field("dtype", 2, _NUMBER),
    Field("segment", 3, refusal="it has a tensor in segments, which bundles never have"),
    *_list(_FIXED32, "float_data", 4),
    *_list(_NUMBER, "int32_data", 5),
    Field("string_data", 6, repeated=True),
    *_list(_NUMBER, "int64_data", 7),
    Field("name", 8),
    Field("raw_data", 9),
    *_list(_FIXED64, "double_data", 10),
    *_list(_NUMBER, "uint64_data", 11),
    Field("text", 12),
    Field("external_data", 13, repeated=True),
    Field("location", 14, _NUMBER),
    Field("metadata", 16, repeated=True),
)
VALUE = make_table(
    "value",
    Field("name", 1),
    Field("type", 2),
    Field("text", 3),
    Field("metadata", 4, repeated=True),
)
TYPE = make_table(
    "type",
    Field("tensor", 1),
    Field("nested", 4),
    Field("map", 5, refusal="it has a map, which bundles never have"),
    Field("denotation", 6),
    Field("opaque", 7, refusal="it has an opaque type, which bundles never have"),
    Field("sparse_tensor", 8, refusal=_NO_SPARSE),
    Field("nested", 9),
)
TENSOR_TYPE = make_table("tensor type", Field("dtype", 1, _NUMBER), Field("shape", 2))
NESTED_TYPE = make_table("type", Field("type", 1))
SHAPE = make_table("shape", Field("dimension", 1, repeated=True))
DIMENSION = make_table(
    "dimension", Field("size", 1, _NUMBER), Field("symbol", 2), Field("denotation", 3)
)

STRINGS = 8
DTYPES: Mapping[int, tuple[int, str]] = {
    1: (32, "float_data"),
    2: (8, "int32_data"),
    3: (8, "int32_data"),
    4: (16, "int32_data"),
    5: (16, "int32_data"),
    6: (32, "int32_data"),
    7: (64, "int64_data"),
    STRINGS: (0, "string_data"),
    9: (8, "int32_data"),
    10: (16, "int32_data"),
    11: (64, "double_data"),
    12: (32, "uint64_data"),
    13: (64, "uint64_data"),
    14: (64, "float_data"),
    15: (128, "double_data"),
    16: (16, "int32_data"),
    17: (8, "int32_data"),
    18: (8, "int32_data"),
    19: (8, "int32_data"),
    20: (8, "int32_data"),
    21: (4, "int32_data"),
    22: (4, "int32_data"),
}
"""For each element type: its bits per element, and the field that has its values.

The values are in that field only if the tensor has no raw bytes.
"""
COMPLEX = frozenset({14, 15})
