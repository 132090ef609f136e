"""Scores that look like probabilities are found by their values, and raw scores are not."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest

from splitonnx.partitioner.cutting.conformance import score_ranges
from splitonnx.partitioner.cutting.conformance.score_ranges import describe_probabilities
from splitonnx.partitioner.cutting.preparations import prepare
from splitonnx.partitioner.gate.gates import open_model
from splitonnx.partitioner.partitions import cut
from splitonnx.partitioner.reports.checks import check
from splitonnx.partitioner.reports.remarks import Kind
from tests.support.nets import FLOAT, Net

Nodes = Sequence[tuple[str, list[str], dict[str, Any]]]
CLASSES = 5
IN_RANGE = "with random inputs and weights, all its values lie between 0 and 1"
SUMS = f"{IN_RANGE} and sum to 1 over the classes"


def build(nodes: Nodes, scale: float = 0.2) -> onnx.ModelProto:
    """Put operators behind scores of shape (N, 5), whose weights have the size ``scale``."""
    net = Net()
    for name, number in {"zero": 0, "half": 0.5, "one": 1, "two": 2, "count": CLASSES}.items():
        net.constant(name, np.array(number, np.float32))
    net.constant("axis", np.array([1]))
    first, last = net.weight("w1", 4, 5), net.weight("w2", 5, CLASSES)
    net.weight("gamma", 5), net.weight("beta", 5)
    value = net.op("MatMul", net.op("MatMul", "x", first, out="h"), last, out="scores")
    for index, (kind, inputs, attributes) in enumerate(nodes):
        value = net.op(kind, *inputs, out=f"t{index}", **attributes)
    model = net.finish({"x": (FLOAT, ["N", 4])}, value, CLASSES)
    for tensor in model.graph.initializer:
        if tensor.name in ("w1", "w2", "gamma", "beta"):
            scaled = scale * onnx.numpy_helper.to_array(tensor)
            tensor.CopyFrom(onnx.numpy_helper.from_array(scaled, tensor.name))
    return model


def describe(nodes: Nodes, loss: str, scale: float = 0.2) -> str:
    output = f"t{len(nodes) - 1}" if nodes else "scores"
    return describe_probabilities(
        prepare(open_model(build(nodes, scale))), loss, output, 1, 1 << 20
    )


def divide_by_sum(*nodes: tuple[str, list[str], dict[str, Any]]) -> Nodes:
    last = f"t{len(nodes) - 1}"
    return [*nodes, ("ReduceSum", [last, "axis"], {}), ("Div", [last, f"t{len(nodes)}"], {})]


SQUASHED: dict[str, tuple[str, Nodes]] = {
    "2 to the x over its sum": (SUMS, divide_by_sum(("Pow", ["two", "scores"], {}))),
    "softplus over its sum": (SUMS, divide_by_sum(("Softplus", ["scores"], {}))),
    "relu over its sum": (
        SUMS,
        divide_by_sum(("Relu", ["scores"], {}), ("Add", ["t0", "half"], {})),
    ),
    "exp over its mean, as often as there are classes": (
        SUMS,
        [("Exp", ["scores"], {}), ("ReduceMean", ["t0", "axis"], {}),
         ("Mul", ["t1", "count"], {}), ("Div", ["t0", "t2"], {})],
    ),
    "hardmax": (SUMS, [("Hardmax", ["scores"], {"axis": 1})]),
    "error function": (
        IN_RANGE,
        [("Erf", ["scores"], {}), ("Mul", ["t0", "half"], {}), ("Add", ["t1", "half"], {})],
    ),
    "clip": (IN_RANGE, [("Clip", ["scores", "zero", "one"], {})]),
    "a quotient of itself and more": (
        IN_RANGE,
        [("Abs", ["scores"], {}), ("Add", ["t0", "one"], {}), ("Div", ["t0", "t1"], {})],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", SQUASHED)
def test_probabilities_are_found_however_they_are_computed(name: str) -> None:
    expected, nodes = SQUASHED[name]
    assert describe(nodes, "cross-entropy") == expected
    assert describe(nodes, "bce-with-logits") == IN_RANGE
    assert describe(nodes, "mse") == ""


RAW: dict[str, Nodes] = {
    "scores": [],
    "scores of small weights behind a relu": [("Relu", ["scores"], {})],
    "a relu behind a normalization, which keeps the size of its inputs from showing": [
        ("LayerNormalization", ["scores", "gamma", "beta"], {}), ("Relu", ["t0"], {}),
    ],
    "a relu that is always zero": [
        ("Abs", ["scores"], {}), ("Neg", ["t0"], {}), ("Relu", ["t1"], {}),
    ],
    "logarithms of probabilities": [("LogSoftmax", ["scores"], {"axis": 1})],
    "numbers on both sides of zero": [("Tanh", ["scores"], {})],
    "a relu with another bound": [("Clip", ["scores", "zero", "count"], {})],
    "what is not a number": [("Sub", ["scores", "scores"], {}), ("Div", ["t0", "t0"], {})],
    "one number for all inputs": [("Sub", ["scores", "scores"], {}), ("Add", ["t0", "half"], {})],
}  # fmt: skip


@pytest.mark.parametrize("name", RAW)
@pytest.mark.parametrize("loss", ["cross-entropy", "bce-with-logits"])
@pytest.mark.parametrize("scale", [1e-3, 0.2])
def test_raw_scores_are_none(name: str, loss: str, scale: float) -> None:
    assert describe(RAW[name], loss, scale) == ""


def test_a_layer_of_weights_at_the_end_is_not_evaluated(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_ranges, "run_session", lambda *_, **__: pytest.fail("it was run"))
    assert describe([], "cross-entropy") == ""
    assert describe([("Softmax", ["scores"], {"axis": 1})], "cross-entropy") == ""
    moved: Nodes = [("Transpose", ["scores"], {}), ("Transpose", ["t0"], {})]
    assert describe(moved, "bce-with-logits") == ""


def test_a_model_of_more_bytes_than_wanted_is_not_evaluated() -> None:
    nodes = SQUASHED["clip"][1]
    prepared = prepare(open_model(build(nodes)))
    assert describe_probabilities(prepared, "bce-with-logits", "t0", 1, most_bytes=20) == ""


def test_cut_and_check_say_it_once_each(caplog: pytest.LogCaptureFixture) -> None:
    model = build(SQUASHED["softplus over its sum"][1])
    with caplog.at_level(logging.WARNING, "splitonnx"):
        cut(model, at="h", check=False)
        assert caplog.records == []
        cut(model, at="h", check=True)
    (record,) = caplog.records
    assert f"looks like probabilities: {SUMS}" in (record.getMessage())
    (remark,) = [own for own in check(model).remarks if own.kind is Kind.ACTIVATION_TWICE]
    assert SUMS in remark.sentence
    assert remark.names == ("t2",)


def test_a_temperature_that_is_trained_lets_scores_leave_the_range() -> None:
    nodes: Nodes = [("Softmax", ["scores"], {"axis": 1}), ("Mul", ["t0", "gamma"], {})]
    assert describe(nodes, "cross-entropy") == ""
