"""LSTM, GRU and RNN in bodies, against differences of the model as onnx's evaluator runs it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from splitonnx.errors import StageFailed
from splitonnx.partitioner.cutting.preparations import prepare
from splitonnx.partitioner.gate.gates import open_model
from splitonnx.partitioner.native import recurrent_layers
from splitonnx.partitioner.partitions import cut_prepared
from tests.support.case_trials import TARGETS, run_step
from tests.support.derivatives import hold_steps
from tests.support.doubles import DOUBLES

GATES = {"GRU": 3, "LSTM": 4, "RNN": 1}
_HEAD = """
<ir_version: 9, opset_import: ["" : 18]>
recurrences (
    float[N, 3] s, float[T, N, 3] x, int64 most, bool c, int32[N] lens, float[DIRECTIONS, N, 3] h
) => (float[N, 2] scores)
{
"""
_REST = "  scores = MatMul (last, w2) }"
_PLAIN = "  q, e = KIND <hidden_size = 3 ATTRIBUTES> (z, w, r, b, INPUTS)"
_BATCH_FIRST = """
    turned = Transpose <perm = [1, 0, 2]> (z)  first = Transpose <perm = [1, 0, 2]> (h)
    p, f = KIND <hidden_size = 3, layout = 1 ATTRIBUTES> (turned, w, r, b, , first)
    q = Transpose <perm = [1, 2, 0, 3]> (p)  e = Transpose <perm = [1, 0, 2]> (f)
"""
_SUMS = """
    front = Constant <value_ints = [0]> ()  t = ReduceSum <keepdims = 0> (e, front)
    axes = Constant <value_ints = [0, 1]> ()  u = ReduceMean <keepdims = 0> (q, axes)
    m = Add (t, u)
"""
BODIES = {
    "Loop": """
        last = Loop <body = step (int64 i, bool on, float[N, 3] a) => (bool off, float[N, 3] n) {
            off = Identity (on)  z = Add (x, a)  NODE  SUMS  n = Tanh (m)
        }> (most, c, s)
    """,
    "Scan": """
        last, rows = Scan <num_scan_inputs = 1,
            body = step (float[N, 3] a, float[N, 3] row) => (float[N, 3] n, float[N, 3] y) {
                place = Constant <value_ints = [0]> ()  a1 = Unsqueeze (a, place)
                row1 = Unsqueeze (row, place)  z = Concat <axis = 0> (a1, row1, row1)
                NODE  SUMS  n = Tanh (m)  y = Mul (n, a)
            }> (s, x)
    """,
    "If": """
        last = If (c) <
            then_branch = one () => (float[N, 3] y1) { z = Mul (x, s)  NODE  SUMS  y1 = Tanh (m) },
            else_branch = two () => (float[N, 3] y2) { y2 = Mul (s, s) }
        >
    """,
}


def build(kind: str, body: str, node: str = _PLAIN, **words: str) -> onnx.ModelProto:
    directions = 2 if "bidirectional" in words.get("ATTRIBUTES", "") else 1
    text = f"{_HEAD}{BODIES[body]}{_REST}".replace("NODE", node).replace("SUMS", _SUMS)
    words = {"INPUTS": "", "ATTRIBUTES": "", **words}
    for word, given in {**words, "KIND": kind, "DIRECTIONS": str(directions)}.items():
        text = text.replace(word, given)
    model = onnx.parser.parse_model(text)
    random, size = np.random.default_rng(0), 3 * GATES[kind]
    shapes: Mapping[str, Sequence[int]] = {
        "w": (directions, size, 3),
        "r": (directions, size, 3),
        "b": (directions, 2 * size),
        "w2": (3, 2),
    }
    for name, shape in shapes.items():
        weights = random.normal(0, 0.5, shape).astype(np.float32)
        model.graph.initializer.append(numpy_helper.from_array(weights, name))
    return model


def draw(model: onnx.ModelProto, *lengths: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(3)
    sizes = {value.name: value.type.tensor_type.shape for value in model.graph.input}
    data = {
        "s": random.standard_normal((2, 3), np.float32),
        "x": random.standard_normal((4, 2, 3), np.float32),
        "h": random.standard_normal((sizes["h"].dim[0].dim_value, 2, 3), np.float32),
        "lens": np.array(lengths or (3, 2), np.int32),
        "most": np.array(2),
        "c": np.array(True),
    }
    return {**data, "labels": random.standard_normal((2, 2), np.float32)}


def take_steps(
    model: onnx.ModelProto, data: Mapping[str, np.ndarray]
) -> Iterator[dict[str, np.ndarray]]:
    """Take a training step with each target on what the model reads of the data."""
    prepared = prepare(open_model(model))
    read = {"labels", *(value.name for value in prepared.training.graph.inputs)}
    given = {name: array for name, array in data.items() if name in read}
    for target in TARGETS:
        yield run_step(cut_prepared(prepared, at=None, loss="mse", client_target=target), given)


def hold(model: onnx.ModelProto) -> None:
    """Hold the gradients of all weights that a step of both targets gives."""
    data = draw(model)
    steps = list(take_steps(model, data))
    for found in steps:
        assert {"w_grad", "r_grad", "b_grad", "w2_grad"} <= set(found)
    hold_steps(steps, model, "mse", data, ["w", "r", "b", "w2"])


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("kind", GATES)
def test_a_recurrence_in_a_body_is_trained(kind: str, body: str) -> None:
    hold(build(kind, body))


@pytest.mark.parametrize("body", BODIES)
def test_a_recurrence_in_both_directions(body: str) -> None:
    hold(build("GRU", body, ATTRIBUTES=', direction = "bidirectional"'))


@pytest.mark.parametrize("body", BODIES)
def test_a_recurrence_with_lengths_that_are_data(
    body: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """onnx's own evaluator ignores lengths; the class in numpy agrees with ONNX Runtime's."""
    classes = [*DOUBLES, recurrent_layers.LSTM]
    monkeypatch.setattr("tests.support.oracles.DOUBLES", classes)
    hold(build("LSTM", body, INPUTS="lens"))


@pytest.mark.parametrize("body", BODIES)
@pytest.mark.parametrize("kind", ["GRU", "LSTM"])
def test_a_recurrence_whose_batch_comes_first(kind: str, body: str) -> None:
    """ONNX Runtime runs none; the layout was changed outside of bodies alone."""
    hold(build(kind, body, _BATCH_FIRST))


@pytest.mark.parametrize("body", BODIES)
def test_an_empty_sequence_in_a_body_is_refused_with_the_reason(body: str) -> None:
    model = build("LSTM", body, INPUTS="lens")
    with pytest.raises(StageFailed, match="sequence_lens_must_be_1_to_steps"):
        list(take_steps(model, draw(model, 3, 0)))
