"""With the policy ``per-client``, sessions share nothing but what they start from."""

from __future__ import annotations

import numpy as np
import pytest

from splitonnx.errors import BundleError
from splitonnx.messages import Save, TaskKey
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.engine.executors import Executor
from splitonnx.runtime.server.policies.model_makers import ModelMaker
from splitonnx.runtime.server.policies.per_client import PerClient
from splitonnx.runtime.server.policies.tasks import Delivery, MemberReport, Task
from tests.support import tiny
from tests.support.registries import ANN, BOB, greet

WIRES = (
    {"h": np.ones((2, 4), np.float32)},
    {"labels": np.zeros((2, 2), np.float32)},
)


@pytest.fixture
def policy() -> PerClient:
    server = tiny.split_bundle().server
    assert server is not None
    made = PerClient(ModelMaker(Executor(server, Engine(threads=1)), None, None))
    for name in (ANN, BOB):
        joined = made.join(greet(name), name[0], resume=False)
        assert (joined.owner, joined.step) == (name[0], 0)
    return made


def submit(policy: PerClient, session: str, turn: int, step: int = 0) -> list[Delivery]:
    key = TaskKey(session, "train", step, 0)
    task = Task(key=key, turn=turn, seed=0, learning_rate=0.1, tensors=WIRES[turn])
    return list(policy.submit(task))


def test_each_session_trains_its_own_model(policy: PerClient) -> None:
    assert submit(policy, ANN, 0) == []
    deliveries = submit(policy, ANN, 1)
    assert {d.key for d in deliveries} == {TaskKey(ANN, "train", 0, 0)}
    assert [(d.version, d.is_last, sorted(d.tensors)) for d in deliveries] == [
        (0, False, ["h.grad", "loss"]),
        (1, True, []),
    ]
    assert {name: model.version for name, model in policy.models.items()} == {ANN: 1, BOB: 0}
    np.testing.assert_array_equal(policy.models[BOB].executor.state()["W2"], tiny.WEIGHTS["W2"])
    assert not list(policy.tick(1e9))


def test_a_task_that_is_withdrawn_can_begin_again(policy: PerClient) -> None:
    submit(policy, ANN, 0)
    policy.withdraw(TaskKey(ANN, "train", 0, 0))
    submit(policy, ANN, 0)
    assert submit(policy, ANN, 1)[-1].is_last


def test_a_session_goes_back_alone(policy: PerClient) -> None:
    for name in (ANN, BOB):
        submit(policy, name, 0)
        submit(policy, name, 1)
    assert policy.list_steps(ANN) == (0,)
    policy.rewind(ANN, 0)
    assert {name: model.version for name, model in policy.models.items()} == {ANN: 0, BOB: 1}


def test_a_session_that_left_holds_nothing(policy: PerClient) -> None:
    submit(policy, ANN, 0)
    policy.finish(ANN)
    policy.leave(ANN)
    policy.leave(ANN)
    policy.withdraw(TaskKey(ANN, "train", 0, 0))
    assert set(policy.models) == {BOB}


def test_a_state_that_cannot_be_saved_is_told(policy: PerClient) -> None:
    assert not policy.is_lost(ANN)
    policy.unload(ANN)
    with pytest.raises(BundleError):
        policy.save(Save(session=ANN, step=0))


def test_of_each_session_is_known_the_version_of_its_model(policy: PerClient) -> None:
    submit(policy, BOB, 0)
    submit(policy, BOB, 1)
    found = policy.report_members()
    assert found == {ANN: MemberReport(version=0), BOB: MemberReport(version=1)}
    policy.leave(ANN)
    assert set(policy.report_members()) == {BOB}
    assert set(found) == {ANN, BOB}
