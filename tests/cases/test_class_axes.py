"""Scores whose classes are not on axis 1, as language models write them."""

from __future__ import annotations

import logging

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from splitonnx.errors import UnsupportedModel, UsageError
from splitonnx.names import Target
from splitonnx.partitioner.partitions import cut
from splitonnx.runtime.client.clients import Client
from splitonnx.verifications import verify
from tests.support.case_trials import TARGETS, run_step
from tests.support.derivatives import hold_steps
from tests.support.nets import FLOAT, Net
from tests.support.oracles import LOSSES
from tests.support.small_models import Arrays, evaluate, load_data, load_model

NAME = "06_last_axis_classes"


def flatten_scores(model: onnx.ModelProto, classes: int) -> onnx.ModelProto:
    """Give a model one row of scores for each label, so that axis 1 holds the classes."""
    shape = np.array([-1, classes], np.int64)
    model.graph.initializer.append(numpy_helper.from_array(shape, "rows_shape"))
    model.graph.node.append(helper.make_node("Reshape", ["y", "rows_shape"], ["rows"]))
    model.graph.output[0].CopyFrom(helper.make_tensor_value_info("rows", FLOAT, [None, classes]))
    return model


def flatten_labels(data: Arrays) -> Arrays:
    return {**data, "labels": data["labels"].ravel()}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("axis", [-1, 2])
def test_the_loss_is_taken_over_the_axis_named(axis: int, target: Target) -> None:
    model, data = load_model(NAME), load_data(NAME)
    bundle = cut(model, at=None, class_axis=axis, client_target=target)
    found = run_step(bundle, data)
    flat = flatten_scores(load_model(NAME), 5)
    expected = LOSSES["cross-entropy"](evaluate(flat, data)["rows"], data["labels"].ravel())
    assert float(found["loss"]) == pytest.approx(expected, rel=1e-5)
    hold_steps([found], flat, "cross-entropy", flatten_labels(data), ["w1", "w2"])


@pytest.mark.parametrize("target", TARGETS)
def test_it_trains_split_as_unsplit_and_evaluates_the_same_loss(target: Target) -> None:
    data = load_data(NAME)
    bundle = cut(
        load_model(NAME), at="a", class_axis=-1, client_target=target, server_target=target
    )
    assert verify(bundle, data, batch_size=8).ok
    whole = cut(load_model(NAME), at=None, class_axis=-1)
    flat = flatten_scores(load_model(NAME), 5)
    expected = LOSSES["cross-entropy"](evaluate(flat, data)["rows"], data["labels"].ravel())
    with Client(whole.client, threads=1) as client:
        assert client.evaluate(data)["loss"] == pytest.approx(expected, rel=1e-5)


def test_a_model_that_can_be_read_both_ways_is_refused_with_both() -> None:
    with pytest.raises(UnsupportedModel) as caught:
        cut(load_model(NAME), at=None)
    text = str(caught.value)
    assert "labels [N, 5] fit both" in text
    for axis in (1, 2):
        assert f"--class-axis {axis}" in text
        cut(load_model(NAME), at=None, class_axis=axis)


def build_sequence(*dims: int | str, width: int = 4) -> onnx.ModelProto:
    """Build a model that gives scores for each place of a sequence."""
    net = Net()
    output = net.op("MatMul", "x", net.weight("w", 6, width), out="y")
    return net.finish({"x": (FLOAT, ["N", *dims, 6])}, output, *dims, width)


def test_the_last_axis_is_taken_and_said_where_it_alone_has_a_known_size(
    caplog: pytest.LogCaptureFixture,
) -> None:
    bundle = cut(build_sequence("T"), at=None)
    (spec,) = [s for p in bundle.client.manifest.phases for s in p.data if s.name == "labels"][:1]
    assert (spec.shape, spec.bounds) == (("N", "T"), (0, 4))
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "the last axis of output 'y' [N, T, 4] as the classes" in record.getMessage()
    caplog.clear()
    cut(build_sequence("T"), at=None, class_axis=2)
    assert not caplog.records


def test_axis_1_is_taken_where_labels_of_another_shape_would_be_refused() -> None:
    bundle = cut(build_sequence(3), at=None)
    (spec,) = [s for p in bundle.client.manifest.phases for s in p.data if s.name == "labels"][:1]
    assert (spec.shape, spec.bounds) == (("N", 4), (0, 3))


@pytest.mark.parametrize("axis", [0, 3, -3, 7])
def test_an_axis_that_the_scores_do_not_have_is_refused(axis: int) -> None:
    with pytest.raises(UsageError, match=f"--class-axis {axis} is not an axis of output 'y'"):
        cut(build_sequence("T"), at=None, class_axis=axis)


def test_a_loss_without_classes_takes_no_axis() -> None:
    with pytest.raises(UsageError, match="--class-axis is for cross-entropy; mse has no classes"):
        cut(build_sequence("T"), at=None, loss="mse", class_axis=2)


@pytest.mark.parametrize("target", TARGETS)
def test_a_softmax_over_the_last_axis_is_applied_once(target: Target) -> None:
    net = Net()
    scores = net.op("MatMul", "x", net.weight("w", 6, 4), out="scores")
    output = net.op("Softmax", scores, out="y", axis=-1)
    model = net.finish({"x": (FLOAT, ["N", "T", 6])}, output, "T", 4)
    random = np.random.default_rng(0)
    data: Arrays = {
        "x": random.standard_normal((3, 5, 6)).astype(np.float32),
        "labels": random.integers(0, 4, (3, 5)),
    }
    found = run_step(cut(model, at=None, class_axis=-1, client_target=target), data)
    weight = numpy_helper.to_array(model.graph.initializer[0])
    expected = LOSSES["cross-entropy"]((data["x"] @ weight).reshape(-1, 4), data["labels"].ravel())
    assert float(found["loss"]) == pytest.approx(expected, rel=1e-5)


def test_labels_may_have_another_name() -> None:
    data = load_data(NAME)
    data["next"] = data.pop("labels")
    bundle = cut(load_model(NAME), at="a", class_axis=-1, labels="next")
    assert verify(bundle, data, batch_size=8).ok
    wires = [w.tensor.name for p in bundle.client.manifest.phases for w in p.wires]
    assert "next@server" in wires
