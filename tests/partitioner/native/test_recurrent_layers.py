"""LSTM, GRU and RNN of the comparison, against ONNX Runtime's kernels and onnx's own cases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from onnx.backend.test.case.node import gru, lstm, rnn
from onnx.reference import ReferenceEvaluator

from splitonnx.partitioner.native.recurrent_layers import RECURRENT_LAYERS

STEPS, BATCH, SIZE, HIDDEN = 5, 3, 2, 3
GATES = {"GRU": 3, "LSTM": 4, "RNN": 1}
NAMES = ["x", "w", "r", "b", "lens", "h", "c", "p"]
FUNCTIONS = {
    "GRU": ["Softsign", "LeakyRelu"],
    "LSTM": ["HardSigmoid", "Elu", "Softplus"],
    "RNN": ["ThresholdedRelu"],
}
BOTH = {"direction": "bidirectional"}
CASES: list[tuple[str, dict[str, Any]]] = [
    *((kind, {}) for kind in GATES),
    *((kind, {"direction": "reverse", "clip": 0.3}) for kind in GATES),
    *((kind, BOTH) for kind in GATES),
    *((kind, {"activations": names}) for kind, names in FUNCTIONS.items()),
    ("GRU", {"linear_before_reset": 1}),
    ("LSTM", {"input_forget": 1}),
    ("RNN", {**BOTH, "activations": ["Affine", "ScaledTanh"],
             "activation_alpha": [0.5, 1.7], "activation_beta": [0.2, 0.6]}),
    ("RNN", {**BOTH, "activations": ["Affine", "ScaledTanh"]}),
    ("LSTM", {"activations": ["Sigmoid", "Elu", "LeakyRelu"], "activation_alpha": [0.4, 0.2]}),
]  # fmt: skip


def draw(kind: str, attributes: Mapping[str, Any]) -> dict[str, np.ndarray]:
    random = np.random.default_rng(4)
    count = 2 if attributes.get("direction") == "bidirectional" else 1
    shapes = {
        "x": (STEPS, BATCH, SIZE),
        "w": (count, GATES[kind] * HIDDEN, SIZE),
        "r": (count, GATES[kind] * HIDDEN, HIDDEN),
        "b": (count, 2 * GATES[kind] * HIDDEN),
        "h": (count, BATCH, HIDDEN),
    }
    if kind == "LSTM":
        shapes |= {"c": shapes["h"], "p": (count, 3 * HIDDEN)}
    arrays = {n: random.normal(0, 0.8, s).astype(np.float32) for n, s in shapes.items()}
    return {**arrays, "lens": np.array([2, 5, 1], np.int32)}


def write(
    kind: str, attributes: Mapping[str, Any], arrays: Mapping[str, np.ndarray]
) -> onnx.ModelProto:
    names = [name if name in arrays else "" for name in NAMES]
    while not names[-1]:
        names.pop()
    outputs = ["y", "yh", "yc"] if kind == "LSTM" else ["y", "yh"]
    node = helper.make_node(kind, names, outputs, hidden_size=HIDDEN, **attributes)
    inputs = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
        for n, a in arrays.items()
    ]
    kept = [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in outputs]
    graph = helper.make_graph([node], "one", inputs, kept)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def evaluate(model: onnx.ModelProto, arrays: Mapping[str, np.ndarray]) -> Sequence[np.ndarray]:
    found = ReferenceEvaluator(model, new_ops=list(RECURRENT_LAYERS)).run(None, dict(arrays))
    assert isinstance(found, list)
    return found


@pytest.mark.parametrize("left_out", ["", "lens", "bhcp"])
@pytest.mark.parametrize(("kind", "attributes"), CASES, ids=str)
def test_kernels_of_onnxruntime_compute_the_same(
    kind: str, attributes: dict[str, Any], left_out: str
) -> None:
    drawn = draw(kind, attributes)
    gone = {"lens"} if left_out == "lens" else {*left_out}
    arrays = {name: array for name, array in drawn.items() if name not in gone}
    model = write(kind, attributes, arrays)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    expected = session.run(None, arrays)
    for found, wanted in zip(evaluate(model, arrays), expected, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", GATES)
def test_layout_1_is_layout_0_with_the_batch_first(kind: str) -> None:
    arrays = draw(kind, BOTH)
    expected = evaluate(write(kind, BOTH, arrays), arrays)
    turned = {n: a.swapaxes(0, 1) if n in ("x", "h", "c") else a for n, a in arrays.items()}
    found = evaluate(write(kind, {**BOTH, "layout": 1}, turned), turned)
    np.testing.assert_array_equal(found[0], expected[0].transpose(2, 0, 1, 3))
    for state, wanted in zip(found[1:], expected[1:], strict=True):
        np.testing.assert_array_equal(state, wanted.swapaxes(0, 1))


def list_cases() -> list[tuple[str, onnx.NodeProto, Sequence[np.ndarray], Sequence[np.ndarray]]]:
    """List onnx's own node tests of the three operators: name, node, inputs, outputs."""
    found: list[Any] = []

    def note(node: onnx.NodeProto, *, inputs: Any, outputs: Any, name: str, **_: Any) -> None:
        found.append((name, node, inputs, outputs))

    with pytest.MonkeyPatch.context() as patch:
        for module, kind in ((gru, gru.GRU), (lstm, lstm.LSTM), (rnn, rnn.RNN)):
            patch.setattr(module, "expect", note)
            for name in [name for name in vars(kind) if name.startswith("export")]:
                getattr(kind, name)()
    return found


ONNX_CASES = list_cases()


@pytest.mark.parametrize("case", ONNX_CASES, ids=[case[0] for case in ONNX_CASES])
def test_node_tests_of_onnx_pass(case: tuple[str, onnx.NodeProto, Any, Any]) -> None:
    _, node, inputs, outputs = case
    names = [name for name in node.input if name]
    graph = helper.make_graph(
        [node],
        "one",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, a.shape)
         for n, a in zip(names, inputs, strict=True)],
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in node.output if n],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 22)])
    found = evaluate(model, dict(zip(names, inputs, strict=True)))
    for array, wanted in zip(found, outputs, strict=True):
        np.testing.assert_allclose(array, wanted, rtol=1e-5, atol=1e-6)


def test_float64_is_computed_as_float64() -> None:
    arrays = draw("LSTM", {})
    wide = {n: a.astype(np.float64) if a.dtype == np.float32 else a for n, a in arrays.items()}
    model = write("LSTM", {}, wide)
    for found, single in zip(evaluate(model, wide), evaluate(model, arrays), strict=True):
        assert found.dtype == np.float64
        np.testing.assert_array_equal(found.astype(np.float32), single)


@pytest.mark.parametrize("length", [0, -1, STEPS + 1])
def test_lengths_are_from_1_to_the_number_of_steps(length: int) -> None:
    arrays = draw("GRU", {})
    arrays["lens"][1] = length
    with pytest.raises(RuntimeError, match="sequence_lens are not 3 numbers from 1 to 5"):
        evaluate(write("GRU", {}, arrays), arrays)
