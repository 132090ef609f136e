"""Recurrences with the batch first, against the same ones that onnx's evaluator runs time first."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper

from splitonnx.partitioner.normalization.recurrence_layouts import normalize_layouts

BATCH, TIME, WIDTH, HIDDEN = 2, 4, 3, 5
GATES = {"GRU": 3, "LSTM": 4, "RNN": 1}
STATES = {"GRU": ["h"], "LSTM": ["h", "c"], "RNN": ["h"]}


def draw(kind: str, directions: int) -> dict[str, np.ndarray]:
    """Draw what a recurrence reads, with the time first."""
    rows = GATES[kind] * HIDDEN
    shapes = {
        "x": (TIME, BATCH, WIDTH), "w": (directions, rows, WIDTH), "r": (directions, rows, HIDDEN),
        "b": (directions, 2 * rows), **dict.fromkeys(STATES[kind], (directions, BATCH, HIDDEN)),
    }  # fmt: skip
    random = np.random.default_rng(0)
    return {n: 0.5 * random.standard_normal(s).astype(np.float32) for n, s in shapes.items()}


def build(kind: str, arrays: dict[str, np.ndarray], layout: int, directions: int) -> ir.Model:
    outputs = ["y", *(f"{state}_last" for state in STATES[kind])]
    node = helper.make_node(
        kind, ["x", "w", "r", "b", "", *STATES[kind]], outputs, name="cells", hidden_size=HIDDEN,
        layout=layout, direction="bidirectional" if directions == 2 else "forward",
    )  # fmt: skip
    graph = helper.make_graph(
        [node], "g",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, a.shape) for n, a in arrays.items()],
        [onnx.ValueInfoProto(name=name) for name in outputs],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    return ir.from_proto(model)


def run(model: ir.Model, arrays: dict[str, np.ndarray]) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString())
    return [np.asarray(array) for array in session.run(None, arrays)]


@pytest.mark.parametrize("kind", ["GRU", "LSTM", "RNN"])
@pytest.mark.parametrize("directions", [1, 2])
def test_the_batch_first_is_the_time_first_transposed(kind: str, directions: int) -> None:
    arrays = draw(kind, directions)
    expected = run(build(kind, arrays, 0, directions), arrays)
    turned = {
        n: a.swapaxes(0, 1).copy() if n in ("x", *STATES[kind]) else a for n, a in arrays.items()
    }
    model = build(kind, turned, 1, directions)
    normalize_layouts(model.graph)
    found = run(model, turned)
    np.testing.assert_array_equal(found[0], expected[0].transpose(2, 0, 1, 3))
    for state, right in zip(found[1:], expected[1:], strict=True):
        np.testing.assert_array_equal(state, right.swapaxes(0, 1))


def test_outputs_keep_their_names_and_only_layout_is_dropped() -> None:
    arrays = draw("LSTM", 2)
    model = build("LSTM", arrays, 1, 2)
    normalize_layouts(model.graph)
    assert [value.name for value in model.graph.outputs] == ["y", "h_last", "c_last"]
    (cells,) = [node for node in model.graph if node.op_type == "LSTM"]
    assert set(cells.attributes) == {"hidden_size", "direction"}


@pytest.mark.parametrize("domain", ["", "my.domain"])
def test_what_has_the_time_first_or_is_another_operator_is_left_alone(domain: str) -> None:
    model = build("GRU", draw("GRU", 1), 1 if domain else 0, 1)
    model.graph[0].domain = domain
    normalize_layouts(model.graph)
    assert [node.op_type for node in model.graph] == ["GRU"]
