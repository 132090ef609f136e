"""Why a parameter gets no gradient: the reason names the node at which the gradient ends."""

from __future__ import annotations

from onnx import helper

from splitonnx.partitioner.cutting.preparations import prepare
from splitonnx.partitioner.differentiation.untrained import explain_untrained
from splitonnx.partitioner.gate.gates import open_model
from splitonnx.partitioner.graphs.traversals import map_values, trace_gradients
from tests.support.nets import FLOAT, INT64, Net


def explain(net: Net, output: str, *names: str) -> dict[str, str]:
    prepared = prepare(open_model(net.finish({"x": (FLOAT, ["N", 6])}, output, 3)))
    traced = trace_gradients([map_values(prepared.training.graph)[output]])
    graph = prepared.skeleton.graph
    reached = {value.name or "" for value in traced}
    return explain_untrained(graph, map_values(graph)[output], names, reached)


def test_a_step_function_ends_the_gradient_of_everything_before_it() -> None:
    net = Net()
    value = net.op("Tanh", net.op("MatMul", "x", net.weight("w1", 6, 4), out="a"), out="b")
    value = net.op("Relu", net.op("MatMul", value, net.weight("w2", 4, 4), out="c"), out="d")
    value = net.op("Add", net.op("Sign", value, out="signs"), net.weight("w3", 4), out="e")
    net.op("MatMul", value, net.weight("w4", 4, 3), out="y")
    told = "no gradient passes through node 'signs_node' (Sign) to"
    assert explain(net, "y", "w1", "w2") == {"w1": told, "w2": told}


def test_the_node_that_makes_integers_is_named_and_not_the_one_that_reads_them() -> None:
    net = Net()
    scores = net.op("MatMul", "x", net.weight("w", 6, 3), out="scores")
    whole = net.op("Cast", scores, to=INT64, out="whole")
    whole = net.op("Add", whole, whole, out="twice")
    net.op("Add", net.op("Cast", whole, to=FLOAT, out="real"), net.weight("b", 3), out="y")
    assert explain(net, "y", "w") == {"w": "no gradient passes through node 'whole_node' (Cast) to"}


def test_a_parameter_of_another_output_is_told_apart() -> None:
    net = Net()
    net.op("MatMul", "x", net.weight("w", 6, 3), out="y")
    net.op("MatMul", "x", net.weight("v", 6, 3), out="z")
    model = net.finish({"x": (FLOAT, ["N", 6])}, "y", 3)
    model.graph.output.append(helper.make_tensor_value_info("z", FLOAT, ["N", 3]))
    graph = prepare(open_model(model)).skeleton.graph
    found = explain_untrained(graph, map_values(graph)["y"], ["v"], {"y", "w", "x"})
    assert found == {"v": "'y' does not depend on"}
