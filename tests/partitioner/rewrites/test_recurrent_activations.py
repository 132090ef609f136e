"""An RNN predicts with the activation functions that it is trained with, those of the standard."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from splitonnx.partitioner.partitions import cut
from splitonnx.partitioner.rewrites.recurrent_activations import complete_activations
from splitonnx.runtime.client.clients import Client

Settings = Mapping[str, list[float]]
Function = Callable[[np.ndarray], np.ndarray]

CASES: list[tuple[list[str], Settings, list[Function]]] = [
    (["HardSigmoid"], {}, [lambda v: np.clip(0.2 * v + 0.5, 0, 1)]),
    (["Elu"], {}, [lambda v: np.where(v < 0, np.exp(v) - 1, v)]),
    (["LeakyRelu"], {}, [lambda v: np.where(v < 0, 0.01 * v, v)]),
    (
        ["HardSigmoid"],
        {"activation_alpha": [0.3]},
        [lambda v: np.clip(0.3 * v + 0.5, 0, 1)],
    ),
    (
        ["ScaledTanh", "LeakyRelu"],
        {"activation_alpha": [0.9, 0.02], "activation_beta": [0.8]},
        [lambda v: 0.9 * np.tanh(0.8 * v), lambda v: np.where(v < 0, 0.02 * v, v)],
    ),
    (
        ["Tanh", "HardSigmoid"],
        {"activation_alpha": [0.4], "activation_beta": [0.1]},
        [np.tanh, lambda v: np.clip(0.4 * v + 0.1, 0, 1)],
    ),
]


def build(names: list[str], settings: Settings) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """Build an RNN with one direction for each name, and the mean of its last states behind it."""
    random, count = np.random.default_rng(1), len(names)
    weights = {
        "W": random.normal(size=(count, 5, 4)).astype(np.float32),
        "R": random.normal(size=(count, 5, 5)).astype(np.float32),
        "out": random.normal(size=(5, 2)).astype(np.float32),
    }
    rnn = helper.make_node(
        "RNN", ["x", "W", "R"], ["", "last"], name="rnn", hidden_size=5, activations=names,
        direction="bidirectional" if count == 2 else "forward",
    )  # fmt: skip
    rnn.attribute.extend(helper.make_attribute(name, given) for name, given in settings.items())
    nodes = [
        rnn,
        helper.make_node("ReduceMean", ["last"], ["mean"], axes=[0], keepdims=0),
        helper.make_node("MatMul", ["mean", "out"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes, "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["T", "N", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 2])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 17)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=9), weights


def compute(
    functions: list[Function], weights: Mapping[str, np.ndarray], x: np.ndarray
) -> np.ndarray:
    """Compute what the model gives by the standard, in numpy."""
    last = []
    for direction, function in enumerate(functions):
        state = np.zeros((x.shape[1], 5))
        for row in x if direction == 0 else x[::-1]:
            state = function(row @ weights["W"][direction].T + state @ weights["R"][direction].T)
        last.append(state)
    return np.asarray(np.mean(last, axis=0) @ weights["out"])


@pytest.mark.parametrize(("names", "settings", "functions"), CASES)
def test_predictions_and_the_training_loss_are_those_of_the_standard(
    names: list[str], settings: Settings, functions: list[Function]
) -> None:
    model, weights = build(names, settings)
    x = np.random.default_rng(2).normal(size=(3, 6, 4)).astype(np.float32)
    expected = compute(functions, weights, x)
    bundle = cut(model, at=None, loss="mse", check=True)
    with Client(bundle.client, threads=1) as client:
        (found,) = client.predict_batches([{"x": x}])
        loss = client.step({"x": x, "labels": np.zeros((6, 2), np.float32)})["loss"]
    np.testing.assert_allclose(found["y"], expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(loss, np.mean(expected**2), rtol=1e-5)


def test_what_is_written_means_the_same_by_the_standard() -> None:
    model, _ = build(["Tanh", "HardSigmoid"], {"activation_alpha": [0.4]})
    graph = ir.from_proto(model).graph
    for _ in range(2):  # again, it changes nothing
        complete_activations(graph)
        (node,) = [node for node in graph if node.op_type == "RNN"]
        assert list(node.attributes.get_floats("activation_alpha", [])) == pytest.approx([0.4, 0.4])
        assert list(node.attributes.get_floats("activation_beta", [])) == pytest.approx([0.5, 0.5])


def test_functions_without_parameters_get_none() -> None:
    model, _ = build(["Tanh"], {"activation_alpha": [0.4]})
    graph = ir.from_proto(model).graph
    complete_activations(graph)
    (node,) = [node for node in graph if node.op_type == "RNN"]
    assert "activation_alpha" not in node.attributes
