"""One BatchNormalization that a network calls twice."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import onnxruntime
import pytest

from splitonnx.errors import NotACut
from splitonnx.names import Target
from splitonnx.partitioner.partitions import cut
from splitonnx.verifications import verify
from tests.support.case_trials import STEP, TARGETS, run_step
from tests.support.small_models import (
    evaluate,
    hold_predictions,
    hold_step,
    load_data,
    load_model,
)

NAME = "05_siamese_bn"
TRAINED = ["k", "g", "be", "fw", "fb"]


@pytest.mark.parametrize("target", TARGETS)
def test_its_statistics_follow_both_calls_one_after_the_other(target: Target) -> None:
    model, data = load_model(NAME), load_data(NAME, 8)
    bundle = cut(model, at=None, client_target=target, server_target=target)
    hold_step(bundle, model, load_data(NAME, 4), TRAINED)
    expected = _follow(model, data)
    found = run_step(bundle, data)
    for statistic, made in (("m", "m2"), ("v", "v2")):
        np.testing.assert_allclose(found[made], expected[statistic], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("target", TARGETS)
def test_it_trains_split_as_unsplit_and_predicts_with_its_statistics(target: Target) -> None:
    model, data = load_model(NAME), load_data(NAME)
    bundle = cut(model, at="p", client_target=target, server_target=target)
    assert verify(bundle, data, batch_size=8).ok
    hold_predictions(bundle, _make_inferring(model), data)


def test_a_step_leaves_the_statistics_that_it_was_given_as_they_are() -> None:
    """The kernel writes into its inputs where the new statistics are not outputs of the graph."""
    bundle, data = cut(load_model(NAME), at=None), load_data(NAME, 4)
    session = onnxruntime.InferenceSession(bundle.client.graphs[STEP])
    given = {name: array.copy() for name, array in bundle.client.weights.items()} | data
    feeds = {value.name: given[value.name] for value in session.get_inputs()}
    session.run(None, feeds)
    for name in ("m", "v"):
        np.testing.assert_array_equal(feeds[name], bundle.client.weights[name])


def test_statistics_of_a_call_that_the_loss_does_not_see_are_left_out() -> None:
    model = load_model(NAME)
    model.graph.node[4].input[:] = ["ln", "lc"]  # d = ln - lc
    model.graph.output.append(onnx.helper.make_tensor_value_info("rn", 1, ["N", 3, 6, 6]))
    bundle, data = cut(model, at=None, output="y"), load_data(NAME, 8)
    found = run_step(bundle, data)
    np.testing.assert_allclose(
        found["m1"], _follow(model, data, ("lc",))["m"], rtol=1e-5, atol=1e-6
    )


def test_a_cut_between_the_calls_is_refused_by_name() -> None:
    with pytest.raises(NotACut, match=r"'ln' .* update the same running statist"):
        cut(load_model(NAME), at=["ln", "rc"], freeze=["k", "g", "be"])


def _follow(
    model: onnx.ModelProto, data: Mapping[str, np.ndarray], calls: tuple[str, ...] = ("lc", "rc")
) -> dict[str, np.ndarray]:
    """Follow the running statistics over the calls, with momentum 0.9, from 0 and 1."""
    traced = onnx.ModelProto()
    traced.CopyFrom(model)
    traced.graph.output.extend(onnx.ValueInfoProto(name=name) for name in calls)
    images = evaluate(traced, data)
    mean, variance = np.zeros(3), np.ones(3)
    for name in calls:
        mean = 0.9 * mean + 0.1 * images[name].mean((0, 2, 3), np.float64)
        variance = 0.9 * variance + 0.1 * images[name].var((0, 2, 3), np.float64)
    return {"m": mean, "v": variance}


def _make_inferring(model: onnx.ModelProto) -> onnx.ModelProto:
    for node in model.graph.node:
        if node.op_type == "BatchNormalization":
            del node.output[1:]
            del node.attribute[:]
    return model
