"""Models that end in the activation that the loss applies, and in nodes behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from splitonnx.names import Target
from splitonnx.partitioner.partitions import cut
from splitonnx.runtime.client.clients import Client
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.engine.executors import Executor
from splitonnx.runtime.memory import connect_in_memory
from splitonnx.verifications import verify
from tests.support.case_trials import TARGETS, run_step
from tests.support.derivatives import hold_steps
from tests.support.oracles import LOSSES
from tests.support.small_models import Arrays, evaluate, load_data, load_model

LOSS = {"Softmax": "cross-entropy", "Sigmoid": "bce-with-logits"}
Node = tuple[str, list[str], dict[str, Any]]
TAILS: dict[str, tuple[str, list[Node]]] = {
    "softmax": ("Softmax", []),
    "softmax, identity": ("Softmax", [("Identity", [], {})]),
    "softmax, cast": ("Softmax", [("Cast", [], {"to": TensorProto.FLOAT})]),
    "softmax, clip": ("Softmax", [("Clip", ["low", "high"], {})]),
    "softmax, reshape": ("Softmax", [("Reshape", ["pair"], {}), ("Flatten", [], {})]),
    "sigmoid, clip": ("Sigmoid", [("Clip", ["low", "high"], {})]),
    "sigmoid, reshape": ("Sigmoid", [("Reshape", ["split"], {}), ("Identity", [], {})]),
}
"""Activations, and the nodes behind them: each an operator, its other inputs and attributes."""


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("tail", TAILS)
def test_the_activation_is_applied_once(tail: str, target: Target) -> None:
    kind, nodes = TAILS[tail]
    model, scores = _build(kind, nodes), _build(kind, nodes, is_activated=False)
    data = _draw(scores, kind)
    bundle = cut(model, at=None, loss=LOSS[kind], client_target=target, server_target=target)
    found = run_step(bundle, data)
    expected = LOSSES[LOSS[kind]](evaluate(scores, data)["y"], data["labels"])
    assert float(found["loss"]) == pytest.approx(expected, rel=1e-5)
    assert {"first_grad", "last_grad"} <= found.keys()
    hold_steps([found], scores, LOSS[kind], data, ["first", "last"])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("tail", TAILS)
def test_it_is_inverted_where_a_cut_stands_between_it_and_the_loss(
    tail: str, target: Target
) -> None:
    kind, nodes = TAILS[tail]
    model, scores = _build(kind, nodes), _build(kind, nodes, is_activated=False)
    data = _draw(scores, kind)
    bundle = cut(
        model, at="h", tail_at="active", loss=LOSS[kind],
        client_target=target, server_target=target,
    )  # fmt: skip
    expected = LOSSES[LOSS[kind]](evaluate(scores, data)["y"], data["labels"])
    assert bundle.server is not None
    link = connect_in_memory(Executor(bundle.server, Engine(threads=1)))
    with Client(bundle.client, link, threads=1) as client:
        evaluated = client.evaluate(data)
        stepped = client.step(data)
    assert stepped["loss"] == pytest.approx(expected, rel=1e-4)
    assert evaluated["loss"] == pytest.approx(expected, rel=1e-4)
    # Probabilities cross in float32, which rounds those close to 1.
    assert verify(bundle, data, batch_size=4, rtol=1e-4).ok


@pytest.mark.parametrize(
    ("name", "once", "twice"),
    [("07_softmax_identity", 1.878, 1.403), ("07_softmax_clip", 1.383, 1.371)],
)
def test_the_loss_is_that_of_the_scores(name: str, once: float, twice: float) -> None:
    model, data = load_model(name), load_data(name)
    loss = float(run_step(cut(model, at=None), data)["loss"])
    assert loss == pytest.approx(once, abs=1e-3)
    assert LOSSES["cross-entropy"](evaluate(model, data)["y"], data["labels"]) == pytest.approx(
        twice, abs=1e-3
    )
    assert verify(cut(model, at="b"), data, batch_size=8).ok


def test_what_changes_probabilities_is_not_looked_through() -> None:
    """A Clip that cuts probabilities off, and a Mul, belong to the model."""
    others: list[Node] = [("Clip", ["low", "half"], {}), ("Mul", ["half"], {})]
    for node in others:
        model = _build("Softmax", [node])
        data = _draw(model, "Softmax")
        expected = LOSSES["cross-entropy"](evaluate(model, data)["y"], data["labels"])
        found = run_step(cut(model, at=None), data)
        assert float(found["loss"]) == pytest.approx(expected, rel=1e-5)


def _build(kind: str, tail: Sequence[Node], *, is_activated: bool = True) -> onnx.ModelProto:
    """Make ``x [N, 4] -> h -> scores -> active -> y``; without activation ``y`` are raw scores."""
    random = np.random.default_rng(4)
    constants = {
        "first": random.standard_normal((4, 5)).astype(np.float32),
        "last": random.standard_normal((5, 6)).astype(np.float32),
        "low": np.array(1e-7, np.float32),
        "half": np.array(0.5, np.float32),
        "high": np.array(1 - 1e-7, np.float32),
        "pair": np.array([0, 6, 1]),
        "split": np.array([0, 2, 3]),
    }
    nodes = [
        helper.make_node("MatMul", ["x", "first"], ["h"]),
        helper.make_node("MatMul", ["h", "last"], ["scores"]),
        helper.make_node(kind if is_activated else "Identity", ["scores"], ["active"]),
    ]
    value = "active"
    for index, (operator, inputs, attributes) in enumerate(tail):
        if not is_activated and operator == "Clip":
            operator, inputs = "Identity", []
        nodes.append(helper.make_node(operator, [value, *inputs], [f"v{index}"], **attributes))
        value = f"v{index}"
    nodes.append(helper.make_node("Identity", [value], ["y"]))
    graph = helper.make_graph(
        nodes,
        "last_activation",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return onnx.shape_inference.infer_shapes(model)


def _draw(model: onnx.ModelProto, kind: str) -> Arrays:
    random = np.random.default_rng(6)
    x = random.standard_normal((4, 4)).astype(np.float32)
    shape = evaluate(model, {"x": x})["y"].shape
    classes = np.asarray(random.integers(0, 6, shape[0]))
    labels = classes if kind == "Softmax" else random.random(shape).astype(np.float32)
    return {"x": x, "labels": labels}
