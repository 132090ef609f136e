"""An If is decided if it asks for a batch of 1 alone."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from splitonnx.partitioner.cutting.passes.batch_decisions import (
    decide_by_batch,
    describe_decided,
    refuse_batch_of_1,
)


def build(comparison: str, bound: int, batch: int | str = "N") -> ir.Graph:
    """Build ``y = x + 1 if rows compared with bound else x - 1``."""
    one = numpy_helper.from_array(np.array(1, np.float32), "one")
    branches = [
        helper.make_graph(
            [helper.make_node(kind, ["x", "one"], [f"{kind}_y"], name=kind)],
            kind, [], [helper.make_tensor_value_info(f"{kind}_y", TensorProto.FLOAT, None)],
        )
        for kind in ("Add", "Sub")
    ]  # fmt: skip
    nodes = [
        helper.make_node("Shape", ["x"], ["rows"], name="rows", start=0, end=1),
        helper.make_node(comparison, ["rows", "bound"], ["asked"], name="asked"),
        helper.make_node(
            "If", ["asked"], ["y"], name="branch", then_branch=branches[0], else_branch=branches[1]
        ),
    ]
    graph = helper.make_graph(
        nodes,
        "asked",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 2])],
        [one, numpy_helper.from_array(np.array([bound]), "bound")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    return ir.from_proto(onnx.shape_inference.infer_shapes(model)).graph


@pytest.mark.parametrize(
    ("comparison", "bound", "kind"),
    [
        ("Equal", 1, "Sub"),
        ("Greater", 1, "Add"),
        ("GreaterOrEqual", 2, "Add"),
        ("Less", 2, "Sub"),
        ("LessOrEqual", 1, "Sub"),
    ],
)
def test_the_branch_of_2_samples_or_more_is_taken(comparison: str, bound: int, kind: str) -> None:
    graph = build(comparison, bound)
    assert decide_by_batch(graph, ()) == ["branch"]
    assert [node.op_type for node in graph][-1] == kind
    assert str(graph.inputs[0].shape) == "[N_less_1 + 1,2]"
    assert graph.outputs[0].shape is None


@pytest.mark.parametrize(
    ("comparison", "bound", "batch"),
    [("Equal", 2, "N"), ("Greater", 2, "N"), ("Less", 8, "N"), ("Equal", 1, 4)],
)
def test_other_questions_are_left(comparison: str, bound: int, batch: int | str) -> None:
    graph = build(comparison, bound, batch)
    assert decide_by_batch(graph, ()) == []
    assert [node.op_type for node in graph][-1] == "If"
    assert str(graph.inputs[0].shape) == f"[{batch},2]"


def test_what_no_batch_can_be_restricts_none() -> None:
    graph = build("Less", 1)
    assert decide_by_batch(graph, ()) == []
    assert [node.op_type for node in graph][-1] == "Sub"
    assert str(graph.inputs[0].shape) == "[N,2]"


def test_a_model_is_made_to_refuse_a_batch_of_1() -> None:
    graph = build("Equal", 1)
    decide_by_batch(graph, ())
    refuse_batch_of_1(graph, ())
    model = ir.to_proto(ir.Model(graph, ir_version=9))
    x = np.ones((2, 2), np.float32)
    found, *_ = ReferenceEvaluator(model).run(None, {"x": x})
    np.testing.assert_array_equal(np.asarray(found), x - 1)
    with pytest.raises(IndexError):
        ReferenceEvaluator(model).run(None, {"x": x[:1]})


def test_what_was_decided_is_said() -> None:
    assert describe_decided([]) == ""
    assert "'branch' (If)" in describe_decided(["branch"])
