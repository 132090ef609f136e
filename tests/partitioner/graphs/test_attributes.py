"""Attributes are checked once: what refers to nothing, is of another type or is not there."""

from __future__ import annotations

from typing import Any

import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper

from splitonnx.errors import NotAModel
from splitonnx.partitioner.graphs.attributes import check_attributes

OPSET = 18


def make_graph(node: onnx.NodeProto) -> ir.Graph:
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3])]
    outputs = [helper.make_empty_tensor_value_info(node.output[0])]
    graph = helper.make_graph([node], "g", inputs, outputs)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)])
    return ir.from_proto(model).graph


def refer(node: onnx.NodeProto, name: str, kind: int) -> onnx.NodeProto:
    """Have an attribute refer to a function's, as onnx's checker lets pass in bodies."""
    node.attribute.add(name=name, type=kind, ref_attr_name="outer")
    return node


def wrap(node: onnx.NodeProto) -> onnx.NodeProto:
    """Put a node into both branches of an If."""
    bodies = {
        kind: helper.make_graph(
            [node], kind, [], [helper.make_empty_tensor_value_info(node.output[0])]
        )
        for kind in ("then_branch", "else_branch")
    }
    return helper.make_node("If", ["x"], ["chosen"], name="choice", **bodies)


def make_softmax(**attributes: Any) -> onnx.NodeProto:
    return helper.make_node("Softmax", ["x"], ["y"], name="soft", **attributes)


def test_attributes_of_their_operators_types_pass() -> None:
    check_attributes(make_graph(make_softmax(axis=1)), OPSET)
    check_attributes(make_graph(make_softmax()), OPSET)
    check_attributes(make_graph(wrap(make_softmax(axis=0))), OPSET)


def test_an_attribute_of_another_type_is_refused_by_name() -> None:
    with pytest.raises(NotAModel, match=r"'soft' \(Softmax\).*'axis' is not INT\b"):
        check_attributes(make_graph(make_softmax(axis=1.0)), OPSET)


def test_a_reference_is_refused_where_no_function_is() -> None:
    node = refer(make_softmax(), "axis", onnx.AttributeProto.INT)
    with pytest.raises(NotAModel, match=r"'soft' \(Softmax\).*'axis' refers to"):
        check_attributes(make_graph(node), OPSET)


def test_a_required_attribute_that_is_missing_is_named() -> None:
    node = helper.make_node("Concat", ["x", "x"], ["y"], name="joined")
    with pytest.raises(NotAModel, match=r"'joined' \(Concat\).*: it has no attribute 'axis'"):
        check_attributes(make_graph(node), OPSET)


def test_nodes_in_bodies_are_checked_too() -> None:
    node = refer(make_softmax(), "axis", onnx.AttributeProto.INT)
    for inner in (node, make_softmax(axis="x"), wrap(make_softmax(axis="x"))):
        with pytest.raises(NotAModel, match=r"'soft' \(Softmax\)"):
            check_attributes(make_graph(wrap(inner)), OPSET)


def test_the_version_of_the_node_counts_where_it_has_one() -> None:
    node = helper.make_node("Split", ["x"], ["y"], name="parts", split=[2])
    graph = make_graph(node)
    check_attributes(graph, OPSET)  # opset 18 knows no such attribute
    graph[0].version = 11
    check_attributes(graph, OPSET)
    graph[0].attributes["split"] = ir.AttrInt64("split", 2)
    with pytest.raises(NotAModel, match="'split' is not INTS"):
        check_attributes(graph, OPSET)


def test_an_operator_that_onnx_does_not_have_is_left_to_others() -> None:
    node = helper.make_node("Mine", ["x"], ["y"], domain="my.domain", speed=3)
    check_attributes(make_graph(node), OPSET)
    node = helper.make_node("Unheard", ["x"], ["y"], speed=3)
    check_attributes(make_graph(node), OPSET)
