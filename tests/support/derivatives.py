"""Models with a dynamic batch held against finite differences, on both targets.

Beside the onnx package's node cases (``node_cases``), for what those do not cover.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from splitonnx.partitioner.cutting.preparations import prepare
from splitonnx.partitioner.gate.gates import open_model
from splitonnx.partitioner.partitions import cut_prepared
from tests.support.case_trials import TARGETS, run_step
from tests.support.oracles import make_evaluator, sample_gradients
from tests.support.zoo import Arrays, Net

RTOL = 1e-3


def close_net(net: Net, data: Mapping[str, np.ndarray], output: str = "y") -> onnx.ModelProto:
    """Close a net whose inputs are ``data``, all with a first dimension that is not fixed."""
    inputs = [
        helper.make_tensor_value_info(
            name, helper.np_dtype_to_tensor_dtype(array.dtype), ["N", *array.shape[1:]]
        )
        for name, array in data.items()
    ]
    outputs = [helper.make_tensor_value_info(output, TensorProto.FLOAT, None)]
    graph = helper.make_graph(net.nodes, "net", inputs, outputs, net.weights)
    opsets = [helper.make_opsetid("", net.opset)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    return onnx.shape_inference.infer_shapes(model)


def take_step(
    model: onnx.ModelProto, data: Mapping[str, np.ndarray], train: Sequence[str] = ()
) -> list[Arrays]:
    """Cut a model whole on both targets; give what its training step yields on each.

    ``train`` names weights that are trained whatever they look like.
    """
    labels = draw_labels(model, data)
    prepared = prepare(open_model(model), train=[f"^{re.escape(name)}$" for name in train])
    return [
        run_step(
            cut_prepared(prepared, at=None, loss="mse", client_target=target),
            {**data, "labels": labels},
        )
        for target in TARGETS
    ]


def draw_labels(model: onnx.ModelProto, data: Mapping[str, np.ndarray]) -> np.ndarray:
    """Draw real labels in the shape of the model's output."""
    results = make_evaluator(model).run(None, dict(data))
    assert isinstance(results, list)
    labels: np.ndarray = np.random.default_rng(3).standard_normal(results[0].shape, np.float32)
    return labels


def assert_differentiable(
    net: Net, data: Mapping[str, np.ndarray], output: str = "y", parameters: Sequence[str] = ()
) -> None:
    """Hold the gradients of a net's float weights against float64 finite differences."""
    model = close_net(net, data, output)
    weights = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    trained = list(parameters) or [n for n, w in weights.items() if w.dtype == "f" and w.ndim]
    labels = draw_labels(model, data)
    hold_steps(take_step(model, data, trained), model, "mse", {**data, "labels": labels}, trained)


def hold_steps(
    steps: Sequence[Arrays],
    model: onnx.ModelProto,
    loss: str,
    data: Mapping[str, np.ndarray],
    parameters: Sequence[str],
) -> None:
    """Hold the gradients that training steps gave against finite differences of a model."""
    weights = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    expected = list(sample_gradients(model, loss, data, list(parameters)))
    largest = max(abs(slope) for *_, slope in expected)
    for found in steps:
        for name, index, slope in expected:
            gradient = found.get(f"{name}_grad", np.zeros_like(weights[name]))
            assert abs(float(gradient[index]) - slope) <= RTOL * largest, (name, index)
