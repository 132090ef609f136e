"""Models with poolings between two weights, and what they are held against."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
import onnxruntime
from onnx import helper, numpy_helper

from splitonnx.names import Target
from splitonnx.partitioner.merges import merge
from splitonnx.partitioner.partitions import cut
from splitonnx.runtime.client.clients import Client
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.engine.executors import Executor
from splitonnx.runtime.memory import connect_in_memory
from tests.support.oracles import make_evaluator
from tests.support.zoo import FLOAT

X = np.random.default_rng(3).standard_normal((2, 2, 7, 8)).astype(np.float32) - 1
"""Mostly below zero: a zero beside it is often the largest of its window."""
WIDTHS = np.array([0, 0, 1, 1, 0, 0, 1, 1])


def build(
    nodes: list[onnx.NodeProto], constants: Mapping[str, np.ndarray] | None = None
) -> onnx.ModelProto:
    """Make ``x [N, 2, H, W] -> h -> nodes -> y -> scores``, with a weight on either side."""
    random = np.random.default_rng(5)
    weights = {
        "first": random.standard_normal((2, 2, 1, 1)).astype(np.float32),
        "last": random.standard_normal((1, 2, 1, 1)).astype(np.float32),
        "widths": WIDTHS,
        **(constants or {}),
    }
    graph = helper.make_graph(
        [
            helper.make_node("Conv", ["x", "first"], ["h"], name="enter"),
            *nodes,
            helper.make_node("Mul", ["y", "last"], ["scores"], name="leave"),
        ],
        "pooled",
        [helper.make_tensor_value_info("x", FLOAT, ["N", 2, 7, 8])],
        [helper.make_tensor_value_info("scores", FLOAT, ["N", 2, None, None])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=9)


def evaluate(model: onnx.ModelProto, feeds: dict[str, np.ndarray]) -> np.ndarray:
    results: Any = make_evaluator(model).run(None, feeds)
    return np.asarray(results[0])


def split_off(model: onnx.ModelProto) -> tuple[np.ndarray, np.ndarray]:
    """Compute ``h`` of ``X`` with the model's weight, and give its last weight."""
    stored = [numpy_helper.to_array(tensor) for tensor in model.graph.initializer]
    return np.einsum("nchw,kc->nkhw", X, stored[0][:, :, 0, 0]), stored[1]


def hold_predictions(
    model: onnx.ModelProto,
    expected: np.ndarray,
    target: Target,
    *,
    at: str = "h",
    freeze: Sequence[str] = (),
) -> None:
    """Hold the client's prediction and the merged model, both optimized, against ``expected``."""
    bundle = cut(
        model, at=at, loss="mse", freeze=freeze, client_target=target, server_target=target
    )
    merged = onnxruntime.InferenceSession(merge(bundle))
    np.testing.assert_allclose(merged.run(None, {"x": X})[0], expected, rtol=1e-5, atol=1e-6)
    assert bundle.server is not None
    link = connect_in_memory(Executor(bundle.server, Engine(threads=1)))
    with Client(bundle.client, link, threads=1) as client:
        (predicted,) = client.predict({"x": X}).values()
    np.testing.assert_allclose(predicted, expected, rtol=1e-5, atol=1e-6)


def choose(condition: str, then: list[onnx.NodeProto], other: str) -> onnx.NodeProto:
    """Make an If that gives ``z`` of ``then``, or else the tensor ``other``, as ``y``."""
    value = helper.make_tensor_value_info("z", FLOAT, None)
    same = [helper.make_node("Identity", [other], ["z"], name="same")]
    return helper.make_node(
        "If", [condition], ["y"], name="choose",
        then_branch=helper.make_graph(then, "then", [], [value]),
        else_branch=helper.make_graph(same, "else", [], [value]),
    )  # fmt: skip
