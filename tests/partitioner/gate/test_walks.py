"""Walks over a model's messages reach every node, body and tensor."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import GraphProto, ModelProto, NodeProto, TensorProto, helper, numpy_helper

import splitonnx
from splitonnx.errors import ModelError, NotAModel, UnsupportedModel
from splitonnx.partitioner.gate.gates import open_model
from splitonnx.partitioner.gate.walks import (
    label_node,
    list_all_nodes,
    list_bodies,
    list_graphs,
    list_nodes,
    list_tensors,
    sort_nodes,
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


WEIGHT = np.array([0.5, 2], np.float32)


def make_disordered() -> ModelProto:
    """Build a model whose If reads, in a body of a body, what a node behind it computes."""

    def branch(*nodes: NodeProto) -> GraphProto:
        (name,) = nodes[0].output  # the first node's result is the branch's
        value = helper.make_tensor_value_info(name, TensorProto.FLOAT, None)
        return helper.make_graph(nodes, "branch", [], [value])

    def node(kind: str, source: str, output: str, **branches: GraphProto) -> NodeProto:
        return helper.make_node(kind, [source], [output], output, **branches)

    deep, other = branch(node("Relu", "late", "r")), branch(node("Identity", "late", "s"))
    inner = node("If", "c", "inner", then_branch=deep, else_branch=other)
    then, straight = branch(node("Neg", "inner", "n"), inner), branch(node("Identity", "x", "t"))
    nodes = [
        node("If", "c", "y", then_branch=then, else_branch=straight),
        node("Exp", "z", "late"),
        helper.make_node("Mul", ["x", "w"], ["z"], "z"),
        node("Abs", "x", "unrelated"),
    ]
    x, c = (helper.make_tensor_value_info("x", TensorProto.FLOAT, [2]),
            helper.make_tensor_value_info("c", TensorProto.BOOL, []))  # fmt: skip
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [2])
    return helper.make_model(
        helper.make_graph(nodes, "g", [x, c], [y], [numpy_helper.from_array(WEIGHT, "w")]),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=9,
    )


def test_nodes_come_behind_what_their_bodies_read_and_keep_their_order_otherwise() -> None:
    model = make_disordered()
    given = model.SerializeToString()
    ordered = sort_nodes(model)
    assert [node.name for node in list_all_nodes(ordered)] == [
        "z", "late", "y", "t", "inner", "s", "r", "n", "unrelated",
    ]  # fmt: skip
    onnx.checker.check_model(ordered, full_check=True)
    assert model.SerializeToString() == given


def test_a_model_in_order_is_not_copied() -> None:
    model = make_model()
    assert sort_nodes(model) is model


def test_the_refusal_of_a_cycle_names_a_node_of_it() -> None:
    model = make_disordered()
    model.graph.node[2].input[0] = "late"  # z and late read each other
    assert [node.name for node in sort_nodes(model).graph.node] == [
        "unrelated", "late", "y", "z",
    ]  # fmt: skip
    with pytest.raises(NotAModel, match="node 'late' reads 'z', which nothing before it makes"):
        open_model(model)


def test_a_body_that_reads_the_result_of_its_own_node_is_a_cycle() -> None:
    model = make_disordered()
    model.graph.node[2].input[0] = "y"
    with pytest.raises(NotAModel, match=r"node 's' reads 'late', .* a cycle"):
        open_model(model)


def test_a_model_out_of_order_is_read_as_it_computes() -> None:
    x = np.array([0.5, -2], np.float32)
    model = splitonnx.merge(splitonnx.cut(make_disordered(), at=None, loss="mse"))
    session = onnxruntime.InferenceSession(model)
    for chosen, expected in ((True, -np.exp(x * WEIGHT)), (False, x)):
        (found,) = session.run(None, {"x": x, "c": np.array(chosen)})
        np.testing.assert_allclose(found, expected, rtol=1e-6)
