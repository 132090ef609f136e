"""Names, modes and outputs of a model's forms."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from splitonnx.errors import UnsupportedModel
from splitonnx.partitioner.cutting.passes.forms import (
    keep_data_outputs,
    lift_integers,
    make_inference_form,
    name_nodes,
    name_outputs,
    refuse_unkept_statistics,
)
from splitonnx.partitioner.cutting.passes.work import Work
from splitonnx.partitioner.normalization.opsets import inline_functions
from tests.support.quantized_files import quantize
from tests.support.zoo import ZOO


def build(*nodes: ir.Node, inputs: tuple[ir.Value, ...], outputs: list[ir.Value]) -> ir.Graph:
    return ir.Graph(inputs, outputs, nodes=nodes, opset_imports={"": 18})


def test_nodes_keep_their_names_but_those_without_one_or_with_another_node_s() -> None:
    x = ir.Value(name="x")
    first = ir.node("Relu", [x], name="a", outputs=[ir.Value(name="h1")])
    second = ir.node("Relu", first.outputs, name="a", outputs=[ir.Value(name="h2")])
    third = ir.node("Relu", second.outputs, name="", outputs=[ir.Value(name="h3")])
    graph = build(first, second, third, inputs=(x,), outputs=list(third.outputs))
    name_nodes(graph)
    assert [node.name for node in graph] == ["a", "h2", "h3"]


def test_a_made_name_is_not_one_that_another_node_has() -> None:
    x = ir.Value(name="x")
    first = ir.node("Relu", [x], name="", outputs=[ir.Value(name="h")])
    second = ir.node("Relu", first.outputs, name="h", outputs=[ir.Value(name="y")])
    graph = build(first, second, inputs=(x,), outputs=list(second.outputs))
    name_nodes(graph)
    assert [node.name for node in graph] == ["h_", "h"]


def test_nodes_within_a_body_get_names_too() -> None:
    graph = ir.from_proto(ZOO["chain"].build()).graph
    inner = ir.node("Relu", [graph.inputs[0]], name="", outputs=[ir.Value(name="in")])
    body = ir.Graph([], list(inner.outputs), nodes=[inner], opset_imports={"": 18})
    attributes = {"then_branch": body, "else_branch": body.clone(allow_outer_scope_values=True)}
    graph.append(ir.node("If", [graph.inputs[0]], attributes, name="choice"))
    name_nodes(graph)
    assert inner.name == "in"


def test_a_model_predicts_without_dropout_and_by_running_statistics() -> None:
    graph = ir.from_proto(ZOO["batchnorm_trained"].build()).graph
    make_inference_form(graph)
    modes = [n.attributes.get_int("training_mode", 0) for n in graph if "BatchN" in n.op_type]
    assert modes
    assert not any(modes)
    graph = ir.from_proto(ZOO["dropout"].build()).graph
    make_inference_form(graph)
    assert "Dropout" not in {node.op_type for node in graph}


def test_outputs_of_data_are_kept_and_those_of_weights_or_text_are_not() -> None:
    x, w = ir.Value(name="x"), ir.Value(name="w")
    data, weight = ir.node("Relu", [x]), ir.node("Relu", [w])
    text = ir.node("Cast", [x])
    text.outputs[0].dtype = ir.DataType.STRING
    made = [node.outputs[0] for node in (data, weight, text)]
    graph = build(data, weight, text, inputs=(x, w), outputs=made)
    keep_data_outputs(graph, {"w"})
    assert list(graph.outputs) == [made[0]]


def test_a_statistic_that_the_graph_computes_is_refused() -> None:
    refuse_unkept_statistics({"mean"}, {"mean", "w"})
    with pytest.raises(UnsupportedModel, match=r"'mean'.*--batchnorm frozen"):
        refuse_unkept_statistics({"mean"}, {"w"})


@pytest.mark.filterwarnings("ignore")
def test_integer_arithmetic_is_replaced_only_if_the_user_asked_for_it() -> None:
    found = []
    for dequantize in (False, True):
        work = Work(model=ir.from_proto(quantize("perceptron", "dynamic")), dequantize=dequantize)
        inline_functions(work.model)
        lift_integers(work)
        found.append(work)
    kept, turned = found
    assert kept.dequantized is None
    assert "MatMulInteger" in [node.op_type for node in kept.model.graph]
    assert turned.dequantized is not None
    assert turned.dequantized.kinds == {"MatMulInteger": 2}
    assert {"W1", "W2"} <= turned.given


def test_outputs_of_control_flow_get_names_that_nothing_else_has() -> None:
    graph = ir.from_proto(ZOO["chain"].build()).graph
    inner = ir.node("Relu", [graph.inputs[0]], outputs=[ir.Value(name="choice/unused/0")])
    body = ir.Graph([], [*inner.outputs] * 2, nodes=[inner], opset_imports={"": 18})
    attributes = {"then_branch": body, "else_branch": body.clone(allow_outer_scope_values=True)}
    made = [ir.Value(name=""), ir.Value(name="y")]
    graph.append(ir.node("If", [graph.inputs[0]], attributes, name="choice", outputs=made))
    plain = ir.node("Dropout", [made[1]], outputs=[ir.Value(name="z"), ir.Value(name="")])
    graph.append(plain)
    name_outputs(graph)
    assert [value.name for value in made] == ["choice/unused/0_", "y"]
    assert [value.name for value in plain.outputs] == ["z", ""]
