"""What operators leave to be guessed of their operands is written out, with the same results."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from splitonnx.names import Target
from splitonnx.partitioner.normalization.explicit_operands import (
    make_reductions_explicit,
    separate_broadcast_scales,
)
from splitonnx.partitioner.partitions import cut
from splitonnx.verifications import verify
from tests.support.case_trials import TARGETS
from tests.support.nets import FLOAT, Net
from tests.support.small_models import hold_predictions, hold_step

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


def test_a_reduction_within_a_branch_does_the_rest_of_its_work() -> None:
    text = """<ir_version: 9, opset_import: ["" : 18]>
    branches (float[2, 2] x, bool on) => (float[2, 2] y) {
        y = If (on) <
            then_branch = then () => (float[2, 2] a) { a = ReduceL1<noop_with_empty_axes = 1>(x) },
            else_branch = other () => (float[2, 2] b) { b = Neg(x) }>
    }"""
    model = ir.from_proto(onnx.parser.parse_model(text))
    make_reductions_explicit(model.graph)
    content = ir.to_proto(model).SerializeToString()
    (found,) = onnxruntime.InferenceSession(content).run(None, {"x": X, "on": np.array(True)})
    np.testing.assert_array_equal(found, np.abs(X))


SCALES: dict[str, tuple[tuple[int, ...], tuple[int, ...] | None, int]] = {
    "scalars": ((), (), -1),
    "one number each": ((1,), (1,), -1),
    "a scale of one number alone": ((1,), None, -1),
    "a bias of one number": ((4,), (1,), -1),
    "leading ones": ((1, 1, 4), (1, 1, 4), -1),
    "one of as many numbers along another axis": ((4, 1), (4,), -1),
    "a matrix beside a vector": ((4, 4), (4,), -1),
    "one row for several that are normalized": ((4,), (4, 4), 1),
    "one column for several that are normalized": ((4, 1), (1, 4), -2),
}
"""Shapes of a scale and a bias, and the first axis that is normalized, for an input [N, 4, 4]."""


def _normalize(case: str) -> onnx.ModelProto:
    scale, bias, axis = SCALES[case]
    random, net = np.random.default_rng(1), Net()
    net.op("MatMul", "x", net.weight("first", 5, 4), out="h")
    operands = [net.constant("scale", (1 + random.standard_normal(scale)).astype(np.float32))]
    if bias is not None:
        operands.append(net.constant("bias", random.standard_normal(bias).astype(np.float32)))
    net.op("LayerNormalization", "h", *operands, out="normal", axis=axis)
    net.op("MatMul", "normal", net.weight("last", 4, 2), out="y")
    return net.finish({"x": (FLOAT, ["N", 4, 5])}, "y", 4, 2)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("case", SCALES)
def test_a_scale_that_is_broadcast_predicts_merges_and_trains(case: str, target: Target) -> None:
    model, random = _normalize(case), np.random.default_rng(2)
    data = {
        "x": random.standard_normal((3, 4, 5)).astype(np.float32),
        "labels": random.standard_normal((3, 4, 2)).astype(np.float32),
    }
    numbers = ["scale", "bias"] if case == "scalars" else []  # which no network learns unasked
    cut_for = partial(cut, loss="mse", train=numbers, client_target=target, server_target=target)
    bundle = cut_for(model, at="h")
    hold_predictions(bundle, model, data)
    assert verify(bundle, data, batch_size=3).ok
    whole = cut_for(model, at=None)
    trained = ["first", "scale", "last", *(["bias"] if SCALES[case][1] is not None else [])]
    hold_step(whole, model, data, trained, loss="mse")


def test_a_scale_that_is_broadcast_is_compared_without_remarks(
    caplog: pytest.LogCaptureFixture,
) -> None:
    for case in SCALES:
        caplog.clear()
        cut(_normalize(case), at="h", loss="mse", check=True)
        assert "does not run" not in caplog.text
        assert ("are single numbers and not trained" in caplog.text) == (case == "scalars")


def test_a_normalization_with_a_whole_scale_is_left_alone() -> None:
    net = Net()
    net.op("LayerNormalization", "x", net.weight("s", 3, 4), net.weight("b", 3, 4), out="y", axis=1)
    model = ir.from_proto(net.finish({"x": (FLOAT, ["N", 3, 4])}, "y", 3, 4))
    separate_broadcast_scales(model.graph)
    assert [node.op_type for node in model.graph] == ["LayerNormalization"]


def test_the_mean_beside_a_scale_that_is_broadcast_stays() -> None:
    net = Net()
    net.op("LayerNormalization", "x", net.constant("s", np.array([3], np.float32)), out="z")
    net.nodes[-1].output.extend(["mean", "inverse"])
    model = net.finish({"x": (FLOAT, ["N", 4])}, net.op("Add", "z", "mean", out="y"), 4)
    changed = ir.from_proto(model)
    separate_broadcast_scales(changed.graph)
    x = np.random.default_rng(0).standard_normal((2, 4)).astype(np.float32)
    mean, width = x.mean(1, keepdims=True), np.sqrt(x.var(1, keepdims=True) + 1e-5)
    np.testing.assert_allclose(run(changed, x), 3 * (x - mean) / width + mean, rtol=1e-5)
