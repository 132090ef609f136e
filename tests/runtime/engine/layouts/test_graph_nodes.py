"""What is read of a graph before its nodes get other layouts."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from splitonnx.runtime.engine.layouts.graph_nodes import PlacedGraph

FLOAT, DOUBLE = TensorProto.FLOAT, TensorProto.DOUBLE


def declare(name: str, shape: list[int | str] | None, kind: int = FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def read(*nodes: onnx.NodeProto, constants: list[TensorProto] | None = None) -> PlacedGraph:
    inputs = [declare("x", ["N", 3]), declare("w", [4, 3]), declare("d", [4], DOUBLE)]
    inputs += [declare("u", None), declare("s", [])]
    graph = helper.make_graph(nodes, "g", inputs, [declare("y", [2, 2])], constants or [])
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return PlacedGraph(model.SerializeToString())


def test_shapes_are_those_declared_of_float_values() -> None:
    held = numpy_helper.from_array(np.zeros((2, 5), np.float32), "held")
    expected = {"x": (None, 3), "w": (4, 3), "s": (), "y": (2, 2), "held": (2, 5)}
    assert read(constants=[held]).shapes == expected


def test_all_shapes_are_those_of_values_of_any_type_with_fixed_dimensions() -> None:
    held = numpy_helper.from_array(np.array([[7]]), "held")
    expected = {"w": (4, 3), "d": (4,), "s": (), "y": (2, 2), "held": (1, 1)}
    assert read(constants=[held]).all_shapes == expected


def test_inputs_and_outputs_are_listed_in_order() -> None:
    graph = read()
    assert (graph.inputs, graph.outputs) == (["x", "w", "d", "u", "s"], ["y"])


def test_lists_of_numbers_are_read_from_initializers_and_constants() -> None:
    packed = helper.make_tensor("packed", TensorProto.INT64, [2], [-1, 5])
    node = helper.make_node(
        "Constant", [], ["made"], value=numpy_helper.from_array(np.array([-1, 7]))
    )
    filled = helper.make_node(
        "ConstantOfShape", ["packed"], ["filled"], value=numpy_helper.from_array(np.array([3]))
    )
    scalar = numpy_helper.from_array(np.array(3), "scalar")
    found = read(node, filled, constants=[packed, scalar]).constants
    assert found == {"packed": (-1, 5), "made": (-1, 7)}


def test_a_node_is_read_with_the_place_of_its_bytes() -> None:
    node = helper.make_node("Conv", ["x", "w"], ["y"], "n", group=2, pads=[1, 0], auto_pad="VALID")
    graph = read(node)
    (found,) = graph.nodes
    start, stop = found.place
    assert onnx.NodeProto.FromString(graph.content[start:stop]) == node
    assert (found.name, found.operator, found.domain) == ("n", "Conv", "")
    assert found.integers["group"] == (2,)
    assert found.integers["pads"] == (1, 0)
    read_back = [
        onnx.AttributeProto.FromString(graph.content[start:stop])
        for start, stop in found.attributes
    ]
    assert read_back == list(node.attribute)


def test_uses_count_nodes_and_outputs() -> None:
    graph = read(helper.make_node("Add", ["x", "x"], ["z"]), helper.make_node("Abs", ["z"], ["y"]))
    assert (graph.uses["x"], graph.uses["z"], graph.uses["y"], graph.uses["w"]) == (2, 1, 1, 0)
    assert not graph.has_bodies


def test_bodies_are_noticed() -> None:
    body = helper.make_graph([helper.make_node("Abs", ["x"], ["b"])], "b", [], [declare("b", [1])])
    node = helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body)
    assert read(node).has_bodies


def test_the_model_s_version_and_operator_sets_are_kept() -> None:
    graph = read()
    assert graph.ir_version == 10
    found = [onnx.OperatorSetIdProto.FromString(graph.content[a:b]) for a, b in graph.opsets]
    assert [(entry.domain, entry.version) for entry in found] == [("", 18), ("com.microsoft", 1)]
