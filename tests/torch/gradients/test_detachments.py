"""Nodes for detach become Identities, and lookups of padding are written on their own."""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from splitonnx.torch.gradients.detachments import replace_detachments, stop_paddings


def build(*nodes: onnx.NodeProto) -> onnx.ModelProto:
    weight = numpy_helper.from_array(np.arange(8, dtype=np.float32).reshape(4, 2), "weight")
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info("x", TensorProto.INT64, ["N", 3])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 3, 2])],
        [weight],
    )
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("splitonnx.torch", 1)]
    return helper.make_model(graph, opset_imports=opsets)


def test_marked_nodes_become_identities_and_are_named_in_order() -> None:
    model = build(
        helper.make_node("Gather", ["weight", "x"], ["a"]),
        helper.make_node("Detach", ["a"], ["b"], domain="splitonnx.torch"),
        helper.make_node("Identity", ["b"], ["detach_1"]),
        helper.make_node("Identity", ["detach_1"], ["y"]),
    )
    assert replace_detachments(model) == ("b", "detach_1")
    assert [node.op_type for node in model.graph.node] == ["Gather", *["Identity"] * 3]
    assert [entry.domain for entry in model.opset_import] == [""]


def test_a_lookup_with_padding_computes_the_same() -> None:
    model = build(helper.make_node("Gather", ["weight", "x"], ["y"]))
    replace_detachments(model)
    given = {"x": np.array([[0, 3, 1], [2, 1, 1]])}
    (before,) = ReferenceEvaluator(model).run(None, given)
    assert stop_paddings(model, {"weight": 1}) == ("y.padding",)
    onnx.checker.check_model(model)
    (after,) = ReferenceEvaluator(model).run(None, given)
    np.testing.assert_array_equal(after, before)


def test_other_lookups_stay_as_they_are() -> None:
    model = build(helper.make_node("Gather", ["weight", "x"], ["y"], axis=1))
    assert stop_paddings(model, {"weight": 1, "other": 0}) == ()
    assert len(model.graph.node) == 1
