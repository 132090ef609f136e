"""Element types as ONNX Runtime infers them: the same asked whole or by kinds of node."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from splitonnx.partitioner.graphs.traversals import map_values
from splitonnx.partitioner.inference import node_types
from splitonnx.partitioner.inference.node_types import list_types
from splitonnx.partitioner.native import workers
from splitonnx.partitioner.native.workers import Refused

FLOAT = TensorProto.FLOAT


def build(*nodes: onnx.NodeProto, opset: int = 18, **weights: np.ndarray) -> ir.Model:
    """A model whose inner values have no type noted."""
    graph = helper.make_graph(
        list(nodes), "joint", [helper.make_tensor_value_info("x", FLOAT, ["N", 6])],
        [onnx.ValueInfoProto(name=nodes[-1].output[0])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )  # fmt: skip
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    model = ir.from_proto(helper.make_model(graph, opset_imports=imports, ir_version=9))
    for value in model.graph.initializers.values():
        tensor = value.const_value
        assert tensor is not None
        value.type, value.shape = ir.TensorType(tensor.dtype), ir.Shape(tensor.shape.numpy())
    return model


def write_chain(count: int) -> list[onnx.NodeProto]:
    """Nodes of few kinds, many times, one of them known to ONNX Runtime alone."""
    nodes, last = [], "x"
    for index in range(count):
        nodes.append(helper.make_node("Tanh", [last], [f"t{index}"]))
        gelu = helper.make_node("FastGelu", [f"t{index}"], [f"g{index}"], domain="com.microsoft")
        nodes.append(gelu)
        nodes.append(helper.make_node("Greater", [f"g{index}", f"t{index}"], [f"m{index}"]))
        nodes.append(helper.make_node("Cast", [f"m{index}"], [f"c{index}"], to=TensorProto.DOUBLE))
        nodes.append(helper.make_node("Cast", [f"c{index}"], [f"f{index}"], to=FLOAT))
        last = f"f{index}"
    return nodes


KINDS = {"t": "float", "g": "float", "m": "bool", "c": "double", "f": "float"}


@pytest.mark.parametrize("few", [10_000, 0])
def test_types_are_the_same_asked_whole_or_by_kinds(
    few: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(node_types, "FEW_NODES", few)
    found = list_types(build(*write_chain(8)))
    expected = {
        f"{letter}{index}": f"tensor({kind})"
        for letter, kind in KINDS.items()
        for index in range(8)
    }
    del expected["f7"]  # an output of the graph itself
    assert {name: found.get(name) for name in expected} == expected


def test_a_large_graph_is_asked_for_once_a_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    original = workers.call

    def count(function: Any, subject: str, content: bytes) -> Any:
        asked.append(len(onnx.ModelProto.FromString(content).graph.node))
        return original(function, subject, content)

    monkeypatch.setattr(node_types, "FEW_NODES", 0)
    monkeypatch.setattr(node_types, "call", count)
    model = build(*write_chain(20))
    for name, value in map_values(model.graph).items():
        if name[0] in "tmcf" and value.producer() is not None:  # as onnx's own inference notes them
            kind = {"m": ir.DataType.BOOL, "c": ir.DataType.DOUBLE}.get(name[0], ir.DataType.FLOAT)
            value.type = ir.TensorType(kind)
    found = list_types(model)
    assert found == {f"g{index}": "tensor(float)" for index in range(20)}
    (nodes,) = asked
    assert nodes <= 2 * len(KINDS)  # of 100: those that read the input, and those behind them


def test_nodes_of_other_attributes_are_other_kinds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_types, "FEW_NODES", 0)
    nodes = [
        helper.make_node("Cast", ["x"], ["a"], to=TensorProto.INT32),
        helper.make_node("Cast", ["x"], ["b"], to=TensorProto.INT64),
        helper.make_node("Cast", ["a"], ["c"], to=FLOAT),
    ]
    found = list_types(build(*nodes))
    assert (found["a"], found["b"]) == ("tensor(int32)", "tensor(int64)")
    assert found["c"] == "tensor(float)"


def test_a_graph_with_a_body_is_asked_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    def branch(kind: str, operator: str) -> onnx.GraphProto:
        node = helper.make_node(operator, ["x"], [f"{kind}.y"])
        return helper.make_graph(
            [node], kind, [], [helper.make_tensor_value_info(f"{kind}.y", FLOAT, ["N", 6])]
        )

    choice = helper.make_node(
        "If", ["go"], ["y"],
        then_branch=branch("then", "Neg"), else_branch=branch("else", "Exp"),
    )  # fmt: skip
    monkeypatch.setattr(node_types, "FEW_NODES", 0)
    found = list_types(build(choice, helper.make_node("Tanh", ["y"], ["z"]), go=np.array(True)))
    assert found["y"] == found["z"] == "tensor(float)"


@pytest.mark.parametrize("few", [10_000, 0])
def test_a_node_without_a_kernel_is_refused(few: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_types, "FEW_NODES", few)
    nodes = [
        helper.make_node("Cast", ["x"], ["a"], to=TensorProto.INT16),
        helper.make_node("Tanh", ["a"], ["b"]),
    ]
    with pytest.raises(Refused, match="Tanh"):
        list_types(build(*nodes))
