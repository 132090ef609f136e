"""Weights behind a Softmax or a Sigmoid that keep its values between 0 and 1, and others."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from splitonnx.partitioner.differentiation.activations.score_bounds import Bounds, bound_scores
from splitonnx.partitioner.graphs.traversals import map_values
from splitonnx.partitioner.reports.checks import check
from splitonnx.partitioner.reports.remarks import Kind
from tests.support.nets import FLOAT, Net
from tests.support.small_models import evaluate

CLASSES = 4
TURN = np.eye(CLASSES)[[2, 0, 3, 1]]
NOISE = 0.6 * np.eye(CLASSES) + 0.1
Build = Callable[[Net], str]


def build(behind: Build, activation: str = "Softmax") -> onnx.ModelProto:
    net = Net()
    scores = net.op("MatMul", "x", net.weight("w", 6, CLASSES), out="s")
    axis = {"axis": 1} if activation == "Softmax" else {}
    net.op(activation, scores, out="p", **axis)
    return net.finish({"x": (FLOAT, ["N", 6])}, behind(net), CLASSES)


def store(net: Net, name: str, array: object) -> str:
    return net.constant(name, np.array(array, np.float32))


def turn(matrix: np.ndarray) -> Build:
    return lambda net: net.op("MatMul", "p", store(net, "t", matrix), out="y")


def smooth(net: Net) -> str:
    scaled = net.op("Mul", "p", store(net, "keep", 0.9), out="q")
    return net.op("Add", scaled, store(net, "rest", [0.025] * CLASSES), out="y")


def weigh(net: Net) -> str:
    return net.op("Mul", "p", store(net, "prior", [0.1, 0.2, 0.3, 0.4]), out="y")


def combine(net: Net) -> str:
    bias = store(net, "b", np.zeros(CLASSES))
    return net.op("Gemm", "p", store(net, "m", NOISE.T), bias, out="y", transB=1)


def shift(net: Net) -> str:
    return net.op("Sub", "p", store(net, "half", [0.5] * CLASSES), out="y")


WITHIN: Mapping[str, tuple[Build, str]] = {
    "a permutation": (turn(TURN), "Softmax"),
    "noise of labels": (turn(NOISE), "Softmax"),
    "smoothing": (smooth, "Softmax"),
    "a prior": (weigh, "Softmax"),
    "a Gemm": (combine, "Softmax"),
    "a mean of sigmoids": (turn(np.full((CLASSES, CLASSES), 0.25)), "Sigmoid"),
}
BEYOND: Mapping[str, tuple[Build, str]] = {
    "a layer": (turn(np.random.default_rng(0).standard_normal((CLASSES, CLASSES))), "Softmax"),
    "a sum of sigmoids": (turn(NOISE * 2), "Sigmoid"),
    "a shift": (shift, "Softmax"),
    "a first layer of zeros": (turn(np.zeros((CLASSES, CLASSES))), "Softmax"),
    "no activation": (turn(TURN), "Tanh"),
}


def bound(model: onnx.ModelProto) -> Bounds | None:
    weights = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer}
    graph = ir.from_proto(onnx.shape_inference.infer_shapes(model)).graph
    return bound_scores(map_values(graph)["y"], weights.get)


@pytest.mark.parametrize("name", WITHIN)
def test_scores_that_stay_within_are_told_and_lie_there(name: str) -> None:
    model = build(*WITHIN[name])
    found = bound(model)
    assert found is not None
    x = 9 * np.random.default_rng(1).standard_normal((200, 6)).astype(np.float32)
    scores = evaluate(model, {"x": x})["y"]
    assert np.all((scores >= found.low - 1e-6) & (scores <= found.high + 1e-6))
    assert np.all((found.low >= -1e-6) & (found.high <= 1 + 1e-6))
    told = [one for one in check(model, loss="cross-entropy").remarks if one.names == ("y",)]
    assert [one.kind for one in told] == [Kind.ACTIVATION_TWICE]
    assert "as the weights behind its last activation are now" in told[0].sentence


@pytest.mark.parametrize("name", BEYOND)
def test_scores_that_a_layer_makes_are_not_told(name: str) -> None:
    found = check(build(*BEYOND[name]), loss="cross-entropy").remarks
    assert all(one.kind is not Kind.ACTIVATION_TWICE for one in found)


def test_what_else_follows_an_activation_has_no_bounds() -> None:
    assert bound(build(lambda net: net.op("Exp", "p", out="y"))) is None
    assert bound(build(lambda net: net.op("Add", "p", "s", out="y"))) is None
