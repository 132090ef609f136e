"""Walks over a model's messages reach every node, body and tensor."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from splitonnx.errors import ModelError, UnsupportedModel
from splitonnx.partitioner.gate.walks import (
    label_node,
    list_all_nodes,
    list_bodies,
    list_graphs,
    list_nodes,
    list_tensors,
)
from tests.partitioner.gate.broken_models import Breakage, hold_refusal, make_model


def sparse_weight(model: ModelProto) -> None:
    values = numpy_helper.from_array(np.ones(1, np.float32), "sparse")
    indices = numpy_helper.from_array(np.zeros(1, np.int64), "places")
    model.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [4]))


BROKEN: list[Breakage] = [
    (sparse_weight, UnsupportedModel, "sparse"),
]


@pytest.mark.parametrize(
    ("break_it", "kind", "reason"), BROKEN, ids=lambda value: getattr(value, "__name__", "")
)
def test_a_broken_model_is_refused_in_one_line(
    break_it: Callable[[ModelProto], None], kind: type[ModelError], reason: str
) -> None:
    hold_refusal(break_it, kind, reason)


def nest(depth: int) -> NodeProto:
    """An If inside of an If, each with a Constant of its own in both branches."""
    held = helper.make_node(
        "Constant", [], [f"k{depth}"], name=f"held{depth}",
        value=numpy_helper.from_array(np.ones(depth + 1, np.float32), f"tensor{depth}"),
    )  # fmt: skip
    inner = [held] if depth == 0 else [held, nest(depth - 1)]
    output = helper.make_tensor_value_info(f"k{depth}", TensorProto.FLOAT, None)
    bodies = {
        kind: helper.make_graph(inner, f"{kind}{depth}", [], [output])
        for kind in ("then_branch", "else_branch")
    }
    return helper.make_node("If", ["go"], [f"if{depth}"], name=f"if{depth}", **bodies)


def test_nodes_are_listed_with_those_of_their_bodies_behind_them() -> None:
    names = [node.name for node in list_nodes([nest(1), helper.make_node("Relu", ["a"], ["b"])])]
    assert names == ["if1", *["held1", "if0", "held0", "held0"] * 2, ""]


def test_every_graph_of_a_model_is_listed_those_in_functions_too() -> None:
    model = make_model()
    own = list(model.opset_import)
    model.functions.append(helper.make_function("mine", "F", ["go"], ["if1"], [nest(1)], own))
    model.graph.node.append(nest(0))
    names = [graph.name for graph in list_graphs(model)]
    assert names[0] == model.graph.name
    assert names.count("then_branch0") == 3  # one beside the function's, which holds it twice
    assert names.count("then_branch1") == 1
    assert len(list(list_all_nodes(model))) == len(model.graph.node) + 2 + 9


def test_every_tensor_of_a_model_is_listed_wherever_it_is_held() -> None:
    model = make_model()
    stored = [tensor.name for tensor in model.graph.initializer]
    own = list(model.opset_import)
    model.functions.append(helper.make_function("mine", "F", ["go"], ["if0"], [nest(0)], own))
    model.graph.node.append(nest(0))
    for body in list_bodies(model.graph.node[-1]):
        body.initializer.append(numpy_helper.from_array(np.ones(1), "inside"))
    names = [tensor.name for tensor in list_tensors(model)]
    assert sorted(names) == sorted([*stored, *["inside"] * 2, *["tensor0"] * 4])


def test_a_sparse_tensor_of_an_attribute_is_refused_by_name() -> None:
    model = make_model()
    values = numpy_helper.from_array(np.ones(1, np.float32), "sparse")
    places = numpy_helper.from_array(np.zeros(1, np.int64), "places")
    sparse = helper.make_sparse_tensor(values, places, [4])
    model.graph.node.append(helper.make_node("Constant", [], ["s"], sparse_value=sparse))
    with pytest.raises(UnsupportedModel, match="'sparse_value'"):
        list(list_tensors(model))


def test_bodies_in_a_list_are_found_too() -> None:
    bodies = [body for _, body in zip(range(2), list_bodies(nest(0)), strict=False)]
    node = helper.make_node("Case", ["go"], ["y"], domain="mine", cases=bodies)
    assert [body.name for body in list_bodies(node)] == [body.name for body in bodies]
    assert len(list(list_nodes([node]))) == 3


def test_a_node_without_a_name_is_told_by_its_output() -> None:
    assert label_node(helper.make_node("Relu", ["a"], ["b"], name="act")) == "node 'act' (Relu)"
    assert label_node(helper.make_node("Split", ["a"], ["", "c"])) == "node 'c' (Split)"
