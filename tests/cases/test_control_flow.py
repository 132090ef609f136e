"""A Loop, a Scan and an If on data, whose lengths and branches differ from batch to batch.

What the model means is written here in numpy, because onnx's own evaluator knows no Scan along
another axis and joins what a Loop should stack.
"""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
from onnx import numpy_helper

from splitonnx.names import Target
from splitonnx.partitioner.cutting.preparations import prepare
from splitonnx.partitioner.gate.gates import open_model
from splitonnx.partitioner.merges import merge
from splitonnx.partitioner.partitions import cut
from splitonnx.partitioner.reports.inspections import list_cuts
from splitonnx.verifications import verify
from tests.support.case_trials import TARGETS, run_step
from tests.support.oracles import differentiate_numerically
from tests.support.small_models import Arrays, load_model

NAME = "43_loop_if_scan"
LIMIT = 0.35
"""The mean of the Loop's value at which it stops."""
SIZES = {(5, 7): 0.5, (3, 1): -0.5, (2, 9): -0.5, (1, 4): 0.4}
"""Sequences of each batch, their length, and what their numbers are moved by."""


def draw(rows: int, length: int) -> Arrays:
    random = np.random.default_rng([rows, length])
    moved = random.standard_normal((rows, length, 4)) + SIZES[rows, length]
    return {"x": moved.astype(np.float32), "labels": random.integers(0, 3, rows)}


def read_weights() -> Arrays:
    tensors = [numpy_helper.to_array(tensor) for tensor in load_model(NAME).graph.initializer]
    names = [tensor.name for tensor in load_model(NAME).graph.initializer]
    found = zip(names, tensors, strict=True)
    return {n: a.astype(np.float64) for n, a in found if a.dtype == np.float32}


def run(w: Arrays, x: np.ndarray) -> tuple[np.ndarray, int, bool]:
    """Run the model in float64; return its output, the Loop's iterations and the branch."""
    h = np.tanh(x.astype(np.float64) @ w["wx"])
    a, rows = h.mean(1), []
    for b in np.moveaxis(h, 1, 0):
        a = np.tanh(a @ w["wl"] + b)
        rows.append(a @ w["wk"] * w["pl"])
        if not a.mean() < LIMIT:
            break
    c, states = a, []
    for d in np.moveaxis(h, 1, 0):
        c = 1 / (1 + np.exp(-(c @ w["ws"] + d)))
        states.append(c * w["ps"])
    u = np.mean(states, 0) + np.mean(rows, 0)
    positive = bool(h.mean() > 0)
    q = u @ w["w1"] + w["b1"] if positive else np.tanh(c @ w["w2"]) * w["b2"]
    return q @ w["wf"], len(rows), positive


def measure(w: Arrays, data: Arrays) -> float:
    logits, *_ = run(w, data["x"])
    total = np.log(np.exp(logits).sum(1))
    chosen = logits[np.arange(len(logits)), data["labels"]]
    return float((total - chosen).mean())


def test_the_batches_differ_in_iterations_and_in_branches() -> None:
    ran = [run(read_weights(), draw(*sizes)["x"])[1:] for sizes in SIZES]
    assert {positive for _, positive in ran} == {True, False}
    stopped = [count < length for (count, _), (_, length) in zip(ran, SIZES, strict=True)]
    assert {True, False} == set(stopped)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("sizes", SIZES)
def test_gradients_are_those_of_the_model(sizes: tuple[int, int], target: Target) -> None:
    weights, data = read_weights(), draw(*sizes)
    found = run_step(cut(load_model(NAME), at=None, client_target=target), data)
    assert found["loss"] == pytest.approx(measure(weights, data), rel=1e-5)
    for name, array in weights.items():
        steps = differentiate_numerically(lambda: measure(weights, data), array, entries=4)
        for index, slope in steps:
            assert found[f"{name}_grad"][index] == pytest.approx(slope, abs=2e-5), (name, index)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("at", ["h", "q"])
def test_split_training_equals_unsplit_training(at: str, target: Target) -> None:
    bundle = cut(load_model(NAME), at=at, client_target=target, server_target=target)
    batches = [draw(*sizes) for sizes in SIZES]
    assert verify(bundle, batches, steps=4).largest_difference == 0.0


def test_the_merged_model_predicts_as_the_model() -> None:
    merged = onnxruntime.InferenceSession(merge(cut(load_model(NAME), at="h")))
    for sizes in SIZES:
        data = draw(*sizes)
        expected, *_ = run(read_weights(), data["x"])
        (logits,) = merged.run(None, {"x": data["x"]})
        np.testing.assert_allclose(logits, expected, atol=1e-5)


def test_it_can_be_cut_before_and_behind_control_flow() -> None:
    found = list_cuts(prepare(open_model(load_model(NAME))), None)
    assert [cut.tensor for cut in found] == ["e", "h", "q"]
