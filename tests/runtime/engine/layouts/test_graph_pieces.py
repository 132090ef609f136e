"""What was declared stays declared, and a type that is known is told."""

from __future__ import annotations

from typing import Any

import onnx
from onnx import TensorProto, helper

from splitonnx.runtime.engine.layouts.graph_nodes import PlacedGraph
from splitonnx.runtime.engine.layouts.graph_pieces import declare, write_piece


def build() -> PlacedGraph:
    declared = [helper.make_tensor_value_info(n, TensorProto.INT64, ("N", 2)) for n in "xy"]
    node = helper.make_node("Neg", ["x"], ["y"])
    graph = helper.make_graph([node], "g", declared[:1], declared[1:])
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=9)
    return PlacedGraph(model.SerializeToString())


def read(declaration: bytes) -> Any:
    return onnx.ValueInfoProto.FromString(declaration)


def test_a_value_is_declared_as_the_graph_declares_it() -> None:
    found = read(declare(build(), "x", {"x": "tensor(float)"}))
    assert found == helper.make_tensor_value_info("x", TensorProto.INT64, ("N", 2))


def test_another_value_is_declared_by_its_type_or_by_its_name_alone() -> None:
    found = read(declare(build(), "z", {"z": "tensor(bool)"}))
    assert found == helper.make_tensor_value_info("z", TensorProto.BOOL, None)
    assert read(declare(build(), "z")) == onnx.ValueInfoProto(name="z")


def test_a_piece_has_the_operator_sets_of_its_graph() -> None:
    graph = build()
    (node,) = (graph.content[a:b] for name, a, b in graph.fields if name == "node")
    found = onnx.load_from_string(write_piece(graph, [("node", node)]))
    assert [(entry.domain, entry.version) for entry in found.opset_import] == [
        ("", 18), ("com.microsoft", 1),
    ]  # fmt: skip
    assert (found.ir_version, [n.op_type for n in found.graph.node]) == (9, ["Neg"])
