"""The gate before ONNX Runtime: whatever `cut` writes passes, and nothing else does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import AttributeProto, ModelProto, TensorProto, helper

from splitonnx.errors import ForbiddenGraph
from splitonnx.graph_limits import STAGE
from splitonnx.names import Target
from splitonnx.partitioner.partitions import cut
from splitonnx.partitioner.reports.inspections import inspect
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.gate import gates
from splitonnx.runtime.gate.gates import check_graph
from tests.conftest import ROOT
from tests.support.spoiled_graphs import EXTERNAL, FLOAT, hold, inside, nest, refuse, spoil, write
from tests.support.zoo import ZOO

TARGETS: tuple[Target, ...] = ("training", "portable")
NUMPY_TYPES = ("f4", "u1", "i1", "u2", "i2", "i4", "i8", "?", "f2", "f8", "u4", "u8", "c8", "c16")


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
    check_graph("s", write(nest(STAGE.depth)))

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
    refuse(content, "tensor 't': its data are outside the graph")


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
        (write(nest(STAGE.depth + 1)), "nest over 32 deep"),
        (write(helper.make_node("MaxPool", ["x"], ["p"], strides=[1, 0])), "strides below 1"),
        (write(helper.make_node("Conv", ["x"], ["p"], kernel_shape=[-1])), "kernel_shape below 1"),
        (write(helper.make_node("Softmax", ["x"], ["p"], axis=99)), "axis names"),
        (write(helper.make_node("GatherND", ["x"], ["p"], batch_dims=-1)), "batch dim"),
        (write(helper.make_node("Scan", ["x", "w"], ["p"], num_scan_inputs=3)), "reads 3 sequ"),
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


@pytest.mark.parametrize("count", [-1, 0, 4, 1 << 40])
def test_a_scan_of_more_sequences_than_inputs_is_refused(count: int) -> None:
    node = helper.make_node("Scan", ["x", "w", "w"], ["p"], num_scan_inputs=count)
    refuse(write(node), f"reads {count} sequences, but has 3 inputs")


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
        ("nodes", "more than 2 nodes"),
        ("names", "more than 2 names"),
        ("total_bytes", r"it takes \d+ bytes"),
        ("fields", "more fields"),
    ],
)
def test_what_is_too_large_is_refused(
    limit: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    changed: dict[str, Any] = {limit: 2}
    monkeypatch.setattr(gates, "STAGE", replace(STAGE, **changed))
    refuse(spoil(lambda _: None), reason)


def test_the_gate_needs_no_onnx() -> None:
    folder = ROOT / "runtime" / "gate"
    sources = [*folder.glob("*.py"), ROOT / "splitonnx" / "operators.py"]
    assert len(sources) > 3
    assert all("import onnx" not in source.read_text() for source in sources)
