"""A stage's graph as bundles have it, and ways to spoil it, for tests of the gate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from splitonnx.errors import ForbiddenGraph
from splitonnx.runtime.gate.gates import check_graph

FLOAT = TensorProto.FLOAT


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


EXTERNAL = TensorProto(name="t", data_type=FLOAT, dims=[1], data_location=TensorProto.EXTERNAL)
