"""The gate before ONNX Runtime: whatever `cut` writes passes, and nothing else does."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import AttributeProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

from splitonnx.errors import ForbiddenGraph
from splitonnx.operators import STANDARD_OPERATORS, TRAINING_OPERATORS
from splitonnx.partitioner.lowerings import LOWERINGS
from splitonnx.partitioner.partitions import Target, cut
from splitonnx.partitioner.reports.inspections import inspect
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.gate import gates
from splitonnx.runtime.gate.gates import check_graph
from tests.conftest import ROOT
from tests.support.zoo import ZOO

TARGETS: tuple[Target, ...] = ("training", "portable")
FLOAT = TensorProto.FLOAT
NUMPY_TYPES = ("f4", "u1", "i1", "u2", "i2", "i4", "i8", "?", "f2", "f8", "u4", "u8", "c8", "c16")


def build() -> ModelProto:
    """A stage as bundles have it: a weight, an operator of the training runtime, two opsets."""
    nodes = [
        helper.make_node("Add", ["x", "w"], ["a"], name="add"),
        helper.make_node("ReluGrad", ["a", "a"], ["b"], name="grad", domain="com.microsoft"),
        helper.make_node("Transpose", ["b"], ["y"], name="turn", perm=[1, 0]),
    ]
    graph = helper.make_graph(
        nodes,
        "stage",
        [helper.make_tensor_value_info("x", FLOAT, ["N", 3])],
        [helper.make_tensor_value_info("y", FLOAT, [3, "N"])],
        [numpy_helper.from_array(np.arange(3, dtype=np.float32), "w")],
        value_info=[helper.make_tensor_value_info("a", FLOAT, ["N", 3])],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10, producer_name="splitonnx")


def spoil(change: Callable[[ModelProto], object]) -> bytes:
    model = build()
    change(model)
    content: bytes = model.SerializeToString()
    return content


def write(node: NodeProto) -> bytes:
    return spoil(lambda model: model.graph.node.append(node))


def hold(tensor: TensorProto, kind: str = "Constant", **others: Any) -> bytes:
    return write(helper.make_node(kind, [], ["c"], name="held", value=tensor, **others))


def refuse(content: bytes, reason: str) -> None:
    with pytest.raises(ForbiddenGraph, match=reason) as caught:
        check_graph("body.step", content)
    sentence = str(caught.value)
    assert sentence.startswith("the graph of stage 'body.step' is not run")
    assert sentence.isprintable()
    assert len(sentence) < 1000


def nest(depth: int) -> NodeProto:
    """Ifs inside one another."""
    node = helper.make_node("Identity", ["x"], ["i"])
    for _ in range(depth):
        body = helper.make_graph([node], "body", [], [])
        node = helper.make_node("If", ["x"], ["i"], then_branch=body)
    return node


def inside(node: NodeProto) -> bytes:
    """A node in a body in a body."""
    for _ in range(2):
        body = helper.make_graph([node], "body", [], [])
        node = helper.make_node("Loop", ["x"], ["i"], body=body)
    return write(node)


# --- what passes ----------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", ZOO)
def test_every_stage_of_the_zoo_passes(name: str, target: Target) -> None:
    entry = ZOO[name]
    model = entry.build()
    places = [found.tensor for found in inspect(model)]
    for at, tail_at in ((None, ()), (places[0], places[-1])):
        bundle = cut(
            model, at=at, tail_at=tail_at, loss=entry.loss,
            client_target=target, server_target=target,
        )  # fmt: skip
        for party in bundle.parties.values():
            for stage, graph in party.graphs.items():
                check_graph(stage, graph)


def test_the_operators_are_those_of_onnx_and_of_the_partitioners_lowerings() -> None:
    onnx_own = {
        schema.name
        for schema in onnx.defs.get_all_schemas_with_history()
        if schema.domain == "" and schema.since_version <= 21
    }
    assert onnx_own == STANDARD_OPERATORS
    assert LOWERINGS.keys() - STANDARD_OPERATORS <= TRAINING_OPERATORS
    assert LOWERINGS.keys() >= TRAINING_OPERATORS


@pytest.mark.parametrize("dtype", NUMPY_TYPES)
@pytest.mark.parametrize("shape", [(), (0, 2), (3,), (2, 3)])
@pytest.mark.parametrize("raw", [True, False])
def test_tensors_of_all_element_types_pass(dtype: str, shape: tuple[int, ...], raw: bool) -> None:
    array = np.arange(-2, np.prod(shape) - 2).reshape(shape).astype(dtype)
    kind = helper.np_dtype_to_tensor_dtype(array.dtype)
    values = array.tobytes() if raw else array.reshape(-1).tolist()
    check_graph("s", hold(helper.make_tensor("t", kind, shape, values, raw=raw)))


@pytest.mark.parametrize(("dims", "size"), [([], 1), ([2], 1), ([3], 2), ([0], 0), ([2, 2], 2)])
def test_tensors_of_half_bytes_pass(dims: list[int], size: int) -> None:
    check_graph("s", hold(TensorProto(data_type=TensorProto.INT4, dims=dims, raw_data=bytes(size))))
    packed = TensorProto(data_type=TensorProto.UINT4, dims=dims, int32_data=[0x21] * size)
    check_graph("s", hold(packed))


def test_strings_bodies_sequences_and_comments_pass() -> None:
    text = TensorProto(data_type=TensorProto.STRING, dims=[2], string_data=[b"a", b"\xff"])
    check_graph("s", hold(text))
    check_graph("s", write(nest(gates.MAX_DEPTH)))

    def describe(model: ModelProto) -> None:
        model.doc_string = "two\nlines"
        model.metadata_props.add(key="a", value="b\n")
        model.graph.node[0].doc_string = "\t\xe9"
        model.graph.node[0].metadata_props.add(key="a", value="b")
        sequence = helper.make_tensor_sequence_value_info("q", FLOAT, ["N"])
        optional = helper.make_optional_type_proto(sequence.type)
        model.graph.value_info.extend([sequence, helper.make_value_info("o", optional)])
        made = helper.make_node("Optional", [], ["o"], type=sequence.type)
        model.graph.node.append(made)

    check_graph("s", spoil(describe))


# --- what is refused ------------------------------------------------------------------------


def outside(**fields: Any) -> TensorProto:
    tensor = TensorProto(name="t", data_type=FLOAT, dims=[1], raw_data=bytes(4), **fields)
    if "data_location" not in fields:
        tensor.external_data.add(key="location", value="*/_ORT_MEM_ADDR_/*")
    return tensor


EXTERNAL = TensorProto(name="t", data_type=FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
SPARSE = helper.make_sparse_tensor(
    helper.make_tensor("v", FLOAT, [1], [1.0]), helper.make_tensor("i", 7, [1], [0]), [3]
)


def add_function(model: ModelProto) -> None:
    node = helper.make_node("Identity", ["a"], ["b"])
    model.functions.append(helper.make_function("mine", "F", ["a"], ["b"], [node], []))


def add_attribute(model: ModelProto, **fields: Any) -> None:
    model.graph.node[0].attribute.append(AttributeProto(**fields))


def add_attributes(model: ModelProto) -> None:
    for index in range(300):
        add_attribute(model, name=f"a{index}", i=1)


def repeat(field: str) -> bytes:
    """Declare, or make, a value twice."""

    def change(model: ModelProto) -> None:
        values = getattr(model.graph, field)
        values.append(values[0])

    return spoil(change)


def name_opset(domain: str, version: int) -> Callable[[ModelProto], None]:
    return lambda model: model.opset_import.extend([helper.make_opsetid(domain, version)])


@pytest.mark.parametrize("spot", ["initializer", "attribute", "attributes", "body"])
@pytest.mark.parametrize("tensor", [EXTERNAL, outside(), outside(data_location=1)])
def test_data_outside_the_graph_are_refused_wherever_they_are_named(
    spot: str, tensor: TensorProto
) -> None:
    node = helper.make_node("Constant", [], ["c"], value=tensor)
    content = {
        "initializer": lambda: spoil(lambda m: m.graph.initializer.append(tensor)),
        "attribute": lambda: write(node),
        "attributes": lambda: spoil(lambda m: add_attribute(m, name="v", tensors=[tensor])),
        "body": lambda: inside(node),
    }[spot]()
    refuse(content, "tensor 't': its data lie outside the graph")


def test_onnx_runtime_never_sees_what_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "secret").write_bytes(bytes(4))
    monkeypatch.chdir(tmp_path)
    engine = Engine(threads=1)
    monkeypatch.setattr(engine._ort, "InferenceSession", lambda *_, **__: pytest.fail("it did"))
    tensor = TensorProto(name="t", data_type=FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="secret")
    with pytest.raises(ForbiddenGraph, match="outside"):
        engine.load("head.forward", hold(tensor), training=False)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (spoil(lambda m: m.graph.sparse_initializer.append(SPARSE)), "sparse"),
        (spoil(lambda m: add_attribute(m, name="v", sparse_tensor=SPARSE)), "'add': .*sparse"),
        (spoil(lambda m: add_attribute(m, name="v", sparse_tensors=[SPARSE])), "'add': .*sparse"),
        (spoil(lambda m: m.training_info.add()), "training info"),
        (spoil(add_function), "functions of its own"),
        (spoil(lambda m: add_attribute(m, name="v", ref_attr_name="w")), "functions of its own"),
        (spoil(lambda m: setattr(m.graph.node[0], "overload", "o")), "functions of its own"),
        (spoil(lambda m: m.graph.quantization_annotation.add()), "field 14 of graph"),
        (spoil(lambda m: setattr(m, "ir_version", 11)), "IR version 11"),
        (spoil(lambda m: m.ClearField("ir_version")), "IR version 0"),
        (spoil(lambda m: setattr(m, "ir_version", -1)), "IR version"),
        (spoil(lambda m: m.ClearField("opset_import")), "no opset"),
        (spoil(lambda m: m.ClearField("graph")), "empty"),
        (spoil(name_opset("", 22)), "opset 22"),
        (spoil(name_opset("ai.onnx", 99)), "opset 99"),
        (spoil(name_opset("", 0)), "opset 0"),
        (spoil(name_opset("com.microsoft", 2)), "opset 2 of 'com.microsoft'"),
        (spoil(name_opset("ai.onnx.ml", 3)), "domain 'ai.onnx.ml'"),
        (spoil(name_opset("org.pytorch.aten", 1)), "domain 'org.pytorch.aten'"),
        (write(helper.make_node("PythonOp", [], [], "py", domain="com.microsoft")), "'PythonOp'"),
        (write(helper.make_node("Gelu", [], [], "py", domain="com.evil")), "'com.evil'"),
        (write(helper.make_node("EPContext", [], [], "py", domain="com.microsoft")), "EPContext"),
        (write(helper.make_node("Add", [], [], "py", domain="com.microsoft")), "'Add'"),
        (inside(helper.make_node("ATen", [], [], "n", domain="com.microsoft")), "node 'n': 'ATen'"),
        (write(helper.make_node("", [], [], "none")), "node 'none': ''"),
        (repeat("node"), "'a' is given twice"),
        (repeat("input"), "'x' is given twice"),
        (repeat("output"), "'y' is given twice"),
        (repeat("initializer"), "'w' is given twice"),
        (repeat("value_info"), "'a' is given twice"),
        (write(nest(gates.MAX_DEPTH + 1)), "nest over 32 deep"),
        (write(helper.make_node("MaxPool", ["x"], ["p"], strides=[1, 0])), "strides below 1"),
        (write(helper.make_node("Conv", ["x"], ["p"], kernel_shape=[-1])), "kernel_shape below 1"),
        (write(helper.make_node("Softmax", ["x"], ["p"], axis=99)), "axis names"),
        (write(helper.make_node("GatherND", ["x"], ["p"], batch_dims=-1)), "batch dim"),
        (write(helper.make_node("Cast", ["x"], ["p"], to=77)), "element type"),
        (write(helper.make_node("Einsum", ["x"], ["p"], equation="i1")), "equation"),
        (write(helper.make_node("Add", ["x\n"], ["p"])), "control characters"),
        (write(helper.make_node("Add", ["\x1b[2J"], ["p"])), "control characters"),
        (write(helper.make_node("Add", ["x" * 20_000], ["p"])), "a name of 20000 bytes"),
        (write(helper.make_node("Add", [], [], n="x" * 2_000_000)), "a text of 2000000 bytes"),
        (spoil(add_attributes), "attributes"),
    ],
)  # fmt: skip
def test_a_graph_that_is_none_of_a_bundle_is_refused(content: bytes, reason: str) -> None:
    refuse(content, reason)


@pytest.mark.parametrize(
    ("tensor", "reason"),
    [
        (TensorProto(data_type=FLOAT, dims=[1 << 39], raw_data=bytes(20)), "but holds 20"),
        (TensorProto(data_type=FLOAT, dims=[1 << 50], raw_data=bytes(20)), "shape"),
        (TensorProto(data_type=FLOAT, dims=[0, 1 << 50]), "shape"),
        (TensorProto(data_type=FLOAT, dims=[-1], raw_data=b""), "shape"),
        (TensorProto(data_type=FLOAT, dims=[1] * 33, raw_data=bytes(4)), "33|32 dimensions"),
        (TensorProto(data_type=FLOAT, dims=[2], float_data=[1]), "2 values, but holds 1"),
        (TensorProto(data_type=FLOAT, dims=[2], int32_data=[1, 2]), "2 values, but holds 2"),
        (TensorProto(data_type=FLOAT, dims=[2]), "2 values, but holds 0"),
        (TensorProto(data_type=FLOAT, dims=[1], raw_data=bytes(4), float_data=[1]), "holds 4"),
        (TensorProto(data_type=7, dims=[2], int64_data=[-1]), "2 values, but holds 1"),
        (TensorProto(data_type=11, dims=[2], double_data=[1, 2, 3]), "2 values, but holds 3"),
        (TensorProto(data_type=8, dims=[2], string_data=[b"a"]), "2 values, but holds 1"),
        (TensorProto(data_type=8, dims=[], raw_data=b""), "0 bytes, but holds 0"),
        (TensorProto(data_type=0, raw_data=bytes(4)), "element type 0"),
        (TensorProto(data_type=99, raw_data=bytes(4)), "element type 99"),
        (TensorProto(data_type=FLOAT, raw_data=bytes(4), segment={"begin": 0}), "segments"),
    ],
)
def test_a_tensor_that_is_not_what_it_claims_is_refused(tensor: TensorProto, reason: str) -> None:
    refuse(hold(tensor), reason)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda v: setattr(v.type.tensor_type, "elem_type", 99), "value 'x': .*element type 99"),
        (lambda v: setattr(v.type.tensor_type.shape.dim[0], "dim_value", -1), "dimension of -1"),
        (lambda v: setattr(v.type.tensor_type.shape.dim[0], "dim_value", 1 << 60), "dimension of"),
        (lambda v: setattr(v.type.tensor_type.shape.dim[0], "dim_param", "\n"), "control"),
        (lambda v: [v.type.tensor_type.shape.dim.add() for _ in range(40)], "32 dimensions"),
        (lambda v: setattr(v.type.map_type, "key_type", 7), "map"),
        (lambda v: setattr(v.type.sparse_tensor_type, "elem_type", 1), "sparse"),
        (lambda v: setattr(v.type.opaque_type, "name", "o"), "opaque"),
        (lambda v: v.type.CopyFrom(nest_type(20)), "type nests over 8 deep"),
    ],
)
def test_a_declared_type_that_no_bundle_has_is_refused(
    change: Callable[[Any], object], reason: str
) -> None:
    refuse(spoil(lambda model: change(model.graph.input[0])), reason)


def nest_type(depth: int) -> onnx.TypeProto:
    kind = helper.make_tensor_type_proto(FLOAT, [])
    for _ in range(depth):
        kind = helper.make_sequence_type_proto(kind)
    return kind


@pytest.mark.parametrize(
    ("limit", "reason"),
    [
        ("MAX_NODES", "more than 2 nodes"),
        ("MAX_NAMES", "more than 2 names"),
        ("MAX_BYTES", r"it takes \d+ bytes"),
        ("MAX_FIELDS", "more fields"),
    ],
)
def test_what_is_too_large_is_refused(
    limit: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gates, limit, 2)
    refuse(spoil(lambda _: None), reason)


# --- bytes ----------------------------------------------------------------------------------


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


def test_the_gate_needs_no_onnx() -> None:
    folder = ROOT / "runtime" / "gate"
    sources = [folder / f"{name}.py" for name in ("gates", "protobufs", "schemas", "operators")]
    assert all("import onnx" not in source.read_text() for source in sources)
