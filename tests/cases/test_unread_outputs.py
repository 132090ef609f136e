"""A Loop, an If within it and a Scan that each have an output without a name, which nobody reads.

ONNX Runtime runs none of them as they are, so what the model means is written here in numpy.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import numpy_helper

from splitonnx.names import Target
from splitonnx.partitioner.cutting.conformance.dataflow import run_split
from splitonnx.partitioner.merges import merge
from splitonnx.partitioner.partitions import cut
from splitonnx.verifications import verify
from tests.support.case_trials import TARGETS, run_step
from tests.support.oracles import differentiate_numerically
from tests.support.small_models import Arrays

MODEL = """
<ir_version: 8, opset_import: ["" : 18]>
unread (float[N, T, 6] x) => (float[N, 3] y)
<bool on = {1}, int64 zero = {0}, float level = {0.0}, int64[1] first = {0}, int64[1] second = {1}>
{
    h = MatMul (x, w)
    mean = ReduceMean <keepdims = 0> (h, second)
    a = Tanh (mean)
    rows = Shape <start = 0, end = 1> (x)
    times = Squeeze (rows)
    count, c = Loop <
        body = step (int64 i, bool going, int64 n, float[N, 5] d) =>
            (bool again, int64 m, float[N, 5] e) {
                again = Identity (going)
                m = Add (n, i)
                t = MatMul (d, u)
                size = ReduceMean <keepdims = 0> (t)
                positive = Greater (size, level)
                other, e = If (positive) <
                    then_branch = one () => (float[N, 5] o1, float[N, 5] e1) {
                        o1 = Neg (t)  e1 = Sin (t)
                    },
                    else_branch = two () => (float[N, 5] o2, float[N, 5] e2) {
                        o2 = Cos (t)  e2 = Tanh (t)
                    }
                >
            }
    > (times, on, zero, a)
    last, states = Scan <num_scan_inputs = 1, scan_input_axes = [1],
        body = sum (float[N, 5] s, float[N, 5] b) => (float[N, 5] r, float[N, 5] k) {
            r = Add (s, b)  k = Tanh (r)
        }> (c, h)
    q = ReduceSum <keepdims = 0> (states, first)
    y = MatMul (q, v)
}
"""
SHAPES = {"w": (6, 5), "u": (5, 5), "v": (5, 3)}
UNREAD = {"count", "last", "other"}
SIZES = (1, 2, 4)


def read_weights() -> Arrays:
    random = np.random.default_rng(3)
    return {name: random.standard_normal(shape) / 2 for name, shape in SHAPES.items()}


def take_names(graph: onnx.GraphProto) -> None:
    for node in graph.node:
        node.output[:] = ["" if name in UNREAD else name for name in node.output]
        for attribute in node.attribute:
            take_names(attribute.g)


def build() -> onnx.ModelProto:
    model = onnx.parser.parse_model(MODEL)
    take_names(model.graph)
    model.graph.initializer.extend(
        numpy_helper.from_array(array.astype(np.float32), name)
        for name, array in read_weights().items()
    )
    return model


def draw(rows: int) -> Arrays:
    random = np.random.default_rng(rows)
    x = random.standard_normal((rows, 3 + rows, 6)).astype(np.float32)
    return {"x": x, "labels": random.integers(0, 3, rows)}


def run(w: Arrays, x: np.ndarray) -> np.ndarray:
    h = x.astype(np.float64) @ w["w"]
    c = np.tanh(h.mean(1))
    for _ in x:
        t = c @ w["u"]
        c = np.sin(t) if t.mean() > 0 else np.tanh(t)
    states = c[:, None] + np.cumsum(h, 1)
    logits: np.ndarray = np.tanh(states).sum(1) @ w["v"]
    return logits


def measure(w: Arrays, data: Arrays) -> float:
    logits = run(w, data["x"])
    chosen = logits[np.arange(len(logits)), data["labels"]]
    return float((np.log(np.exp(logits).sum(1)) - chosen).mean())


@pytest.mark.parametrize("target", TARGETS)
def test_gradients_are_those_of_the_model(target: Target) -> None:
    bundle = cut(build(), at=None, client_target=target)
    for rows in SIZES:
        weights, data = read_weights(), draw(rows)
        found = run_step(bundle, data)
        assert found["loss"] == pytest.approx(measure(weights, data), rel=1e-5)
        for name, array in weights.items():
            steps = differentiate_numerically(lambda: measure(weights, data), array, entries=4)  # noqa: B023
            for index, slope in steps:
                assert found[f"{name}_grad"][index] == pytest.approx(slope, abs=2e-5), name


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("at", ["h", ("c", "h")])
def test_split_training_equals_unsplit_training(at: str | tuple[str, ...], target: Target) -> None:
    bundle = cut(build(), at=at, client_target=target, server_target=target)
    assert verify(bundle, [draw(rows) for rows in SIZES], steps=3).largest_difference == 0.0


@pytest.mark.parametrize("target", TARGETS)
def test_the_parts_and_the_merged_model_predict_as_the_model(target: Target) -> None:
    bundle = cut(build(), at="h", client_target=target, server_target=target)
    merged = onnxruntime.InferenceSession(merge(bundle))
    for rows in SIZES:
        batch = {"x": draw(rows)["x"]}
        (parts,) = run_split(bundle, [batch], "it")
        for found in (parts["y"], merged.run(["y"], batch)[0]):
            np.testing.assert_allclose(found, run(read_weights(), batch["x"]), atol=1e-5)
