"""An If that asks whether the batch is 1."""

from __future__ import annotations

import logging

import numpy as np
import onnx
import onnxruntime
import pytest

from splitonnx.errors import ArrayMismatch
from splitonnx.names import Target
from splitonnx.partitioner.merges import merge
from splitonnx.partitioner.partitions import cut
from splitonnx.partitioner.reports.checks import check
from splitonnx.runtime.client.clients import Client
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.engine.executors import Executor
from splitonnx.runtime.memory import connect_in_memory
from splitonnx.verifications import verify
from tests.support.case_trials import TARGETS
from tests.support.small_models import hold_predictions, hold_step, load_data, load_model

NAME = "22_if_batch_one"
TRAINED = ["w1", "b1", "w2", "b2"]


@pytest.mark.parametrize("target", TARGETS)
def test_the_branch_for_larger_batches_is_trained(target: Target) -> None:
    model, data = load_model(NAME), load_data(NAME)
    bundle = cut(model, at="a", client_target=target, server_target=target)
    for rows in (2, 5, 32):
        hold_predictions(bundle, model, load_data(NAME, rows))
    assert verify(bundle, data, batch_size=8).ok
    whole = cut(model, at=None, client_target=target, server_target=target)
    hold_step(whole, _write_branch(model), load_data(NAME, 4), TRAINED)


@pytest.mark.parametrize("target", TARGETS)
def test_a_batch_of_1_is_refused_wherever_the_model_runs(target: Target) -> None:
    bundle = cut(load_model(NAME), at="a", client_target=target, server_target=target)
    data = load_data(NAME, 1)
    assert bundle.server is not None
    link = connect_in_memory(Executor(bundle.server, Engine(threads=1)))
    with (
        Client(bundle.client, link, threads=1) as client,
        pytest.raises(ArrayMismatch, match=r"cut for 2 rows or more; `splitonnx check` says why"),
    ):
        client.step(data)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(merge(bundle), options)
    with pytest.raises(
        onnxruntime.capi.onnxruntime_pybind11_state.InvalidArgument, match="batch_of_1"
    ):
        session.run(None, {"x": data["x"]})


def test_it_is_said_by_cut_and_by_check(caplog: pytest.LogCaptureFixture) -> None:
    (remark,) = check(load_model(NAME)).remarks
    assert remark.sentence.startswith("'h' (If) asks whether the batch is 1")
    with caplog.at_level(logging.WARNING):
        cut(load_model(NAME), at="a")
    assert remark.sentence in caplog.text


def test_one_size_of_the_batch_decides_for_itself() -> None:
    for rows in (1, 4):
        bundle = cut(load_model(NAME), at="a", dims={"N": rows})
        hold_predictions(bundle, load_model(NAME), load_data(NAME, rows))


@pytest.mark.parametrize("target", TARGETS)
def test_a_size_between_is_not_decided_but_trained_by_the_branch_that_is_taken(
    target: Target,
) -> None:
    model = load_model(NAME)
    bound = next(tensor for tensor in model.graph.initializer if tensor.name == "one")
    bound.CopyFrom(onnx.numpy_helper.from_array(np.array(3), "one"))
    assert check(model).trainable
    whole = cut(model, at=None, client_target=target)
    for rows in (2, 3, 4):
        hold_step(whole, model, load_data(NAME, rows), TRAINED)


def _write_branch(model: onnx.ModelProto) -> onnx.ModelProto:
    """Replace the If, and what it asks, by the branch for larger batches."""
    first, *_, last = model.graph.node
    nodes = [first, onnx.helper.make_node("Relu", ["a"], ["h"]), last]
    kept = [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes]
    del model.graph.node[:]
    model.graph.node.extend(kept)
    return model
