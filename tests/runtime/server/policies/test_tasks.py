"""What sessions and policies exchange can be sent to another process."""

from __future__ import annotations

import pickle

import numpy as np

from splitonnx.messages import TaskKey
from splitonnx.runtime.server.policies.tasks import (
    Delivery,
    Joined,
    MemberReport,
    RoundReport,
    Task,
)

KEY = TaskKey("a" * 32, "train", 3, 0)
TENSORS = {"h": np.arange(6, dtype=np.float32).reshape(2, 3)}


def test_tasks_and_deliveries_are_data_and_survive_a_pipe() -> None:
    task = Task(key=KEY, turn=0, seed=7, learning_rate=0.1, tensors=TENSORS)
    delivery = Delivery(key=KEY, version=5, tensors=TENSORS)
    for given in (task, delivery):
        found = pickle.loads(pickle.dumps(given))
        assert type(found) is type(given)
        assert found.key == KEY
        np.testing.assert_array_equal(found.tensors["h"], TENSORS["h"])
    joined = Joined(owner="ann", step=2)
    member = MemberReport(version=3, round=1, rounds_behind=2, is_waiting=True)
    for value in (joined, member, RoundReport(closed=3)):
        assert pickle.loads(pickle.dumps(value)) == value


def test_the_end_of_a_task_needs_no_tensors() -> None:
    last = Delivery(key=KEY, version=6, is_last=True)
    assert (dict(last.tensors), last.is_last) == ({}, True)
