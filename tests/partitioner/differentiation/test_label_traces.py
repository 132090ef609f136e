"""Layers of weights hide labels; everything else passes them on.

``tests/partitioner/test_permissions.py`` cuts such models.
"""

from __future__ import annotations

import onnx_ir as ir

from splitonnx.partitioner.differentiation.label_traces import find_bare_ends, trace_labels
from splitonnx.partitioner.graphs.readings import read_model
from tests.support.nets import FLOAT, Net


def build_graph() -> ir.Graph:
    """Build two layers and a scale before the output."""
    net = Net()
    hidden = net.op("MatMul", "x", net.weight("w1", 4, 4), out="h")
    mixed = net.op("MatMul", net.op("Relu", hidden, out="r"), net.weight("w2", 4, 3), out="m")
    output = net.op("Mul", mixed, net.weight("scale", 3), out="y")
    return read_model(net.finish({"x": (FLOAT, ["N", 4])}, output, 3)).graph


def name(values: set[ir.Value]) -> set[str]:
    return {value.name or "" for value in values} - {"w1", "w2", "scale"}


def test_what_is_computed_without_a_layer_of_secret_weights_tells_the_input() -> None:
    graph = build_graph()
    graph.inputs.extend(graph.initializers.values())
    assert name(trace_labels(graph, {"x"}, {"w1", "w2", "scale"})) == {"x"}
    assert name(trace_labels(graph, {"x"}, {"w2"})) == {"x", "h", "r"}
    assert name(trace_labels(graph, {"r"}, ())) == set()  # no input of the graph


def test_only_what_follows_the_last_layer_is_bare() -> None:
    graph = build_graph()
    graph.inputs.extend(graph.initializers.values())
    assert name(find_bare_ends(graph, {"w1", "w2", "scale"})) == {"m", "y"}
    assert name(find_bare_ends(graph, {"w1", "scale"})) == {"h", "r", "m", "y"}
