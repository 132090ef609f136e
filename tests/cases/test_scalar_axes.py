"""Axes that an exporter wrote as scalars."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from splitonnx.names import Target
from splitonnx.partitioner.partitions import cut
from splitonnx.verifications import verify
from tests.support.case_trials import TARGETS
from tests.support.small_models import hold_predictions, hold_step, load_data, load_model

NAME = "16_scalar_axes"
KINDS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "Unsqueeze": (["h", "axis"], {}),
    "Squeeze": (["wide", "axis"], {}),
    "ReduceMean": (["wide", "axis"], {"keepdims": 0}),
    "ReduceL2": (["wide", "axis"], {"keepdims": 0}),
    "Slice": (["h", "start", "stop", "axis"], {}),
}
"""Operators with a single axis each, and their inputs."""


@pytest.mark.parametrize("target", TARGETS)
def test_a_model_with_scalar_axes_trains_split_as_unsplit(target: Target) -> None:
    model, data = load_model(NAME), load_data(NAME)
    bundle = cut(model, at="a", client_target=target, server_target=target)
    hold_predictions(bundle, model, data)
    assert verify(bundle, data, batch_size=8).ok
    whole = cut(model, at=None, client_target=target, server_target=target)
    hold_step(whole, model, load_data(NAME, 4), ["w1", "b1", "k", "w2", "b2"])


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("kind", KINDS)
def test_each_operator_takes_a_single_axis(kind: str, target: Target) -> None:
    model, meant = _build(kind, ()), _build(kind, (1,))
    random = np.random.default_rng(1)
    data = {"x": random.standard_normal((3, 4)).astype(np.float32)}
    bundle = cut(model, at="h", loss="mse", client_target=target, server_target=target)
    hold_predictions(bundle, meant, data)
    whole = cut(model, at=None, loss="mse", client_target=target, server_target=target)
    labels = random.standard_normal((3, 2)).astype(np.float32)
    hold_step(whole, meant, {**data, "labels": labels}, ["first", "last"], loss="mse")


def _build(kind: str, shape: tuple[int, ...]) -> onnx.ModelProto:
    """Make ``x [N, 4] -> h -> an operator with an axis of this shape -> y [N, 2]``."""
    random = np.random.default_rng(0)
    constants = {
        "first": random.standard_normal((4, 4)).astype(np.float32),
        "last": random.standard_normal((4, 2)).astype(np.float32),
        "axis": np.full(shape, 1),
        "start": np.full(shape, 0),
        "stop": np.full(shape, 4),
        "one": np.array([1]),
        "flat": np.array([-1, 4]),
    }
    inputs, attributes = KINDS[kind]
    nodes = [
        helper.make_node("MatMul", ["x", "first"], ["h"]),
        helper.make_node("Unsqueeze", ["h", "one"], ["wide"]),
        helper.make_node(kind, inputs, ["moved"], name="moved", **attributes),
        helper.make_node("Reshape", ["moved", "flat"], ["rows"]),
        helper.make_node("MatMul", ["rows", "last"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "scalar_axis",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 2])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
