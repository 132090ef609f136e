"""A detach that the exporter dropped, put back by the user."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import helper

from splitonnx.names import Target
from splitonnx.partitioner.merges import merge
from splitonnx.partitioner.partitions import cut
from splitonnx.verifications import verify
from tests.support.case_trials import TARGETS, run_step
from tests.support.derivatives import hold_steps
from tests.support.nets import FLOAT, Net
from tests.support.small_models import evaluate, hold_predictions, load_data, load_model

NAME = "41_lost_detach"
TRAINED = ["w1", "b1", "w2", "b2"]


def hold_fixed(model: onnx.ModelProto, name: str) -> onnx.ModelProto:
    """Make a tensor an input, so that differences of the model do not pass through it."""
    (node,) = [node for node in model.graph.node if name in node.output]
    model.graph.node.remove(node)
    model.graph.input.append(helper.make_tensor_value_info(name, FLOAT, None))
    return model


def compute(model: onnx.ModelProto, name: str, data: dict[str, np.ndarray]) -> np.ndarray:
    """Compute an intermediate tensor of a model."""
    model.graph.output.append(helper.make_tensor_value_info(name, FLOAT, None))
    return evaluate(model, data)[name]


@pytest.mark.parametrize("target", TARGETS)
def test_the_gradient_passes_beside_the_stopped_tensor(target: Target) -> None:
    data = load_data(NAME)
    bundle = cut(load_model(NAME), at=None, stop_gradients="e", client_target=target)
    found = run_step(bundle, data)
    fixed = {**data, "e": compute(load_model(NAME), "e", data)}
    hold_steps([found], hold_fixed(load_model(NAME), "e"), "cross-entropy", fixed, TRAINED)
    assert np.abs(found["w1_grad"]).max() > 1e-3


@pytest.mark.parametrize("target", TARGETS)
def test_predictions_stay_and_split_equals_unsplit(target: Target) -> None:
    model, data = load_model(NAME), load_data(NAME)
    for at in ("z", "s"):
        bundle = cut(
            load_model(NAME), at=at, stop_gradients=["e"],
            client_target=target, server_target=target, check=True,
        )  # fmt: skip
        hold_predictions(bundle, model, data)
        assert verify(bundle, data, batch_size=8).ok
    whole = cut(load_model(NAME), at=None, stop_gradients=["e"])
    assert onnx.load_from_string(merge(whole)).graph.output[0].name == "y"


def test_without_the_stop_no_gradient_passes() -> None:
    found = run_step(cut(load_model(NAME), at=None), load_data(NAME))
    assert np.abs(found["w1_grad"]).max() < 1e-6


def build_branches() -> onnx.ModelProto:
    """Build a model in which a tensor is read twice: y = tanh(h) * relu(h)."""
    net = Net()
    hidden = net.op("MatMul", "x", net.weight("w", 4, 3), out="h")
    left, right = net.op("Tanh", hidden, out="left"), net.op("Relu", hidden, out="right")
    return net.finish({"x": (FLOAT, ["N", 4])}, net.op("Mul", left, right, out="y"), 3)


@pytest.mark.parametrize("target", TARGETS)
def test_a_stop_in_one_branch_leaves_the_other_its_gradient(target: Target) -> None:
    random = np.random.default_rng(0)
    data = {
        "x": random.standard_normal((6, 4)).astype(np.float32),
        "labels": random.standard_normal((6, 3)).astype(np.float32),
    }
    bundle = cut(build_branches(), at=None, loss="mse", stop_gradients="left", client_target=target)
    fixed = {**data, "left": compute(build_branches(), "left", data)}
    hold_steps([run_step(bundle, data)], hold_fixed(build_branches(), "left"), "mse", fixed, ["w"])
