"""Gradients that are put back: their inputs and outputs go, their nodes come."""

from __future__ import annotations

from onnx import GraphProto, TensorProto, helper

from splitonnx.partitioner.differentiation.derived.supplied_gradients import (
    NONE,
    SuppliedGradients,
    put_back_gradients,
)


def make_graph() -> GraphProto:
    """A graph as the builder leaves it: ``y`` is hidden, and ``x.copy`` is what it reads."""
    info = helper.make_tensor_value_info
    names = {"inputs": ["x", "x.copy_grad"], "outputs": ["loss", "x.copy", "y_grad", "x_grad"]}
    inputs, outputs = ([info(n, TensorProto.FLOAT, [2]) for n in names[k]] for k in names)
    nodes = [
        helper.make_node("Identity", ["x"], ["x.copy"]),
        helper.make_node("Identity", ["x.copy_grad"], ["x_grad"]),
        helper.make_node("Exp", ["y"], ["y_grad"]),
        helper.make_node("Neg", ["x"], ["loss"]),
    ]
    return helper.make_graph(nodes, "derived", inputs, outputs)


def test_nodes_take_the_place_of_inputs() -> None:
    graph = make_graph()
    node = helper.make_node("Mul", ["y_grad", "y"], ["x.copy_grad"])
    put_back_gradients(graph, SuppliedGradients(nodes=[node], results=["y"], arguments=["x.copy"]))
    assert [value.name for value in graph.input] == ["x"]
    assert [value.name for value in graph.output] == ["loss", "x_grad"]
    assert graph.node[-1] == node
    assert {value.name for value in graph.value_info} == {"x.copy", "y_grad"}


def test_without_gradients_a_graph_stays_as_it_is() -> None:
    graph = make_graph()
    put_back_gradients(graph, NONE)
    assert graph == make_graph()
