"""A model's file cannot bring along the marks that passes make."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import helper

from splitonnx.partitioner.gate.gates import open_model
from splitonnx.partitioner.gate.marks import forget_marks
from splitonnx.partitioner.graphs.builders import DETACHED, HIDDEN
from tests.support.derivatives import close_net, draw_labels, hold_steps, take_step
from tests.support.zoo import Net

DATA = {"x": np.random.default_rng(0).standard_normal((3, 4), np.float32)}


def build(mark: str) -> onnx.ModelProto:
    """Two layers with a marked node between them."""
    net = Net()
    net.op("MatMul", "x", net.weight("w", 4, 4), out="h")
    net.op("Tanh", "h", out="t")
    net.op("MatMul", "t", net.weight("v", 4, 2), out="y")
    model = close_net(net, DATA)
    model.graph.node[1].metadata_props.append(onnx.StringStringEntryProto(key=mark, value="1"))
    return model


@pytest.mark.parametrize("mark", [DETACHED, HIDDEN])
def test_a_gradient_passes_a_node_that_the_file_marks(mark: str) -> None:
    model = build(mark)
    data = {**DATA, "labels": draw_labels(model, DATA)}
    hold_steps(take_step(model, DATA, ["w", "v"]), model, "mse", data, ["w", "v"])


def test_other_notes_and_those_of_the_whole_model_are_kept() -> None:
    proto = build(DETACHED)
    helper.set_model_props(proto, {"splitonnx.options": "{}"})
    proto.graph.node[1].metadata_props.append(onnx.StringStringEntryProto(key="author", value="me"))
    model = open_model(proto)
    assert dict(model.metadata_props) == {"splitonnx.options": "{}"}
    assert dict(model.graph.node(1).metadata_props) == {"author": "me"}


def test_marks_of_a_bundle_s_own_model_are_kept() -> None:
    assert DETACHED in open_model(build(DETACHED), is_marked=True).graph.node(1).metadata_props


def test_marks_in_bodies_and_on_values_are_removed_too() -> None:
    body = helper.make_graph(
        [helper.make_node("Identity", ["x"], ["b"])],
        "body",
        [],
        [helper.make_tensor_value_info("b", 1, [3])],
    )
    graph = helper.make_graph(
        [helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body)],
        "graph",
        [helper.make_tensor_value_info(*v) for v in (("x", 1, [3]), ("c", 9, []))],
        [helper.make_tensor_value_info("y", 1, [3])],
    )
    model = ir.from_proto(helper.make_model(graph))
    branch = model.graph.node(0).attributes["then_branch"].as_graph()
    marked = [
        item.metadata_props for item in (model.graph, model.graph.inputs[0], branch, branch.node(0))
    ]
    for metadata in (*marked, branch.outputs[0].metadata_props):
        metadata["splitonnx.any"] = "1"
    forget_marks(model)
    assert not any((*marked, branch.outputs[0].metadata_props))
