"""Inputs whose batches have two names, although an operator needs them to be equal."""

from __future__ import annotations

import numpy as np
import pytest

from splitonnx.errors import ArrayMismatch
from splitonnx.messages import TaskKey
from splitonnx.names import PREDICT, Target
from splitonnx.partitioner.partitions import cut
from splitonnx.runtime.client.clients import Client
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.engine.executors import Executor
from splitonnx.runtime.memory import connect_in_memory
from splitonnx.verifications import verify
from tests.support.case_trials import TARGETS
from tests.support.small_models import Arrays, hold_predictions, hold_step, load_data, load_model

NAME = "17_gathernd_batch"
AT = ["a", "idx"]


@pytest.mark.parametrize("target", TARGETS)
def test_they_train_split_as_unsplit(target: Target) -> None:
    model, data = load_model(NAME), load_data(NAME)
    bundle = cut(model, at=AT, client_target=target, server_target=target)
    hold_predictions(bundle, model, data)
    assert verify(bundle, data, batch_size=8).ok
    whole = cut(model, at=None, client_target=target, server_target=target)
    hold_step(whole, model, load_data(NAME, 4), ["w1", "b1", "w2", "b2"])


@pytest.mark.parametrize("target", TARGETS)
def test_a_client_refuses_batches_that_differ_before_it_runs_anything(target: Target) -> None:
    bundle = cut(load_model(NAME), at=AT, client_target=target, server_target=target)
    assert bundle.server is not None
    link = connect_in_memory(Executor(bundle.server, Engine(threads=1)))
    data = load_data(NAME, 3)
    data["idx"] = data["idx"][:2]
    with (
        Client(bundle.client, link, threads=1) as client,
        pytest.raises(
            ArrayMismatch, match=r"'idx' should be I64\[N, 1\] where N = 3, but is I64\[2"
        ),
    ):
        client.step(data)


@pytest.mark.parametrize("target", TARGETS)
def test_a_server_refuses_them_before_it_runs_anything(target: Target) -> None:
    bundle = cut(load_model(NAME), at=AT, client_target=target, server_target=target)
    assert bundle.server is not None
    executor = Executor(bundle.server, Engine(threads=1))
    key = TaskKey("lying", PREDICT, 0, 0)
    executor.begin(key, data={}, seed=0, learning_rate=0.1)
    sent: Arrays = {
        "a@server": np.zeros((3, 6), np.float32),
        "idx@server": np.zeros((2, 1), np.int64),
    }
    with pytest.raises(ArrayMismatch, match="where N = 3"):
        executor.deliver(key, sent)
