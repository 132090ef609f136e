"""A reduction over no axes still does the rest of its work, element by element."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from splitonnx.partitioner.normalization.explicit_reductions import make_reductions_explicit

X = np.array([[-2.0, 3.0], [0.5, -0.25]], np.float32)
POSITIVE = np.abs(X)
MEANINGS = {
    "ReduceL1": np.abs(X),
    "ReduceL2": np.sqrt(X**2),
    "ReduceLogSum": np.log(POSITIVE),
    "ReduceLogSumExp": np.log(np.exp(X)),
    "ReduceMax": X,
    "ReduceMean": X,
    "ReduceMin": X,
    "ReduceProd": X,
    "ReduceSum": X,
    "ReduceSumSquare": X**2,
}


def build(kind: str, axes: np.ndarray | None, **attributes: Any) -> ir.Model:
    inputs, stored = ["x"], []
    if axes is not None:
        inputs.append("axes")
        stored.append(numpy_helper.from_array(axes, "axes"))
    node = helper.make_node(kind, inputs, ["y"], name="node", **attributes)
    graph = helper.make_graph(
        [node], "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)], stored,
    )  # fmt: skip
    graph.output[0].CopyFrom(onnx.ValueInfoProto(name="y"))
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    return ir.from_proto(model)


def run(model: ir.Model, x: np.ndarray) -> np.ndarray:
    content = ir.to_proto(model).SerializeToString()
    return np.asarray(onnxruntime.InferenceSession(content).run(None, {"x": x})[0])


@pytest.mark.parametrize("axes", [None, np.zeros(0, np.int64)])
@pytest.mark.parametrize("kind", MEANINGS)
def test_a_reduction_over_no_axes_does_the_rest_of_its_work(
    kind: str, axes: np.ndarray | None
) -> None:
    model = build(kind, axes, noop_with_empty_axes=1)
    make_reductions_explicit(model.graph)
    assert kind not in {node.op_type for node in model.graph}
    x = POSITIVE if kind == "ReduceLogSum" else X
    np.testing.assert_allclose(run(model, x), MEANINGS[kind], rtol=1e-6)


@pytest.mark.parametrize(
    ("axes", "attributes"),
    [
        (None, {}),
        (np.zeros(0, np.int64), {}),
        (np.array([1]), {"noop_with_empty_axes": 1}),
        (np.array([0]), {"keepdims": 0}),
    ],
)
def test_a_reduction_over_axes_is_left_alone(
    axes: np.ndarray | None, attributes: dict[str, int]
) -> None:
    model = build("ReduceSum", axes, **attributes)
    before = ir.to_proto(model).SerializeToString(deterministic=True)
    make_reductions_explicit(model.graph)
    assert ir.to_proto(model).SerializeToString(deterministic=True) == before


def test_axes_that_the_graph_computes_are_left_to_the_runtime() -> None:
    model = build("ReduceSum", None, noop_with_empty_axes=1)
    axes = ir.Value(name="axes", type=ir.TensorType(ir.DataType.INT64), shape=ir.Shape(["K"]))
    model.graph.inputs.append(axes)
    node = model.graph[0]
    node.resize_inputs(2)
    node.replace_input_with(1, axes)
    make_reductions_explicit(model.graph)
    assert [left.op_type for left in model.graph] == ["ReduceSum"]


def test_the_same_name_in_another_domain_is_another_operator() -> None:
    model = build("ReduceL1", None, noop_with_empty_axes=1)
    model.graph[0].domain = "my.domain"
    make_reductions_explicit(model.graph)
    assert [node.op_type for node in model.graph] == ["ReduceL1"]
