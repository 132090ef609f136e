"""A step of several clients goes on when each has begun its next task of it."""

from __future__ import annotations

import pytest

from splitonnx.errors import RemoteProtocolError
from splitonnx.messages import TaskKey
from splitonnx.names import ACCUMULATE, TRAIN, UPDATE
from splitonnx.runtime.server.policies.steps.running_steps import RunningStep
from tests.support.shared_models import step_task

ANN, BOB = "a" * 32, "b" * 32


def begin() -> RunningStep:
    """Begin a step, which is Ann's fourth and Bob's second."""
    keys = (TaskKey(ANN, ACCUMULATE, 3, 0), TaskKey(BOB, ACCUMULATE, 1, 0))
    return RunningStep(keys=keys, learning_rate=0.1, begun=0.0, since=0.0)


def test_a_client_with_fewer_micro_batches_waits_with_its_update() -> None:
    step = begin()
    step.is_between = True
    second, update = TaskKey(ANN, ACCUMULATE, 3, 1), TaskKey(BOB, UPDATE, 1, 1)
    step.note(update, 2.0)
    step.begin_next_task([update])
    assert (step.is_between, step.list_silent({BOB})) == (True, (ANN,))
    assert step.list_unfinished(1.9) == ()
    assert step.list_unfinished(2.0) == (ANN,)
    step.note(second, 3.0)
    step.begin_next_task([update, second])
    assert (step.keys, step.own) == ((second,), second)
    step.is_between = True
    last = TaskKey(ANN, UPDATE, 3, 2)
    step.note(last, 4.0)
    step.begin_next_task([update, last])
    assert step.keys == (last, update)
    assert step.own == last  # the model's own number of micro-batches is the largest
    assert step.list_unfinished(9.0) == ()


def test_the_model_s_tasks_are_named_by_one_client_whoever_takes_part() -> None:
    step = begin()
    step.is_between = True
    update, second = TaskKey(ANN, UPDATE, 3, 1), TaskKey(BOB, ACCUMULATE, 1, 1)
    for key in (update, second):
        step.note(key, 1.0)
    step.begin_next_task([update, second])
    assert step.keys == (second,)
    assert step.own == TaskKey(ANN, ACCUMULATE, 3, 1)


def test_a_step_knows_its_clients_tasks_and_with_which_they_would_begin_it_again() -> None:
    step = begin()
    assert step.includes(TaskKey(BOB, UPDATE, 1, 7))
    assert not step.includes(TaskKey(BOB, UPDATE, 2, 7))
    step.note(TaskKey(BOB, ACCUMULATE, 1, 1), 1.0)
    assert step.firsts == {TaskKey(ANN, ACCUMULATE, 3, 0), TaskKey(BOB, ACCUMULATE, 1, 0)}
    whole = RunningStep(keys=(TaskKey(ANN, TRAIN, 3, 0),), learning_rate=0.1, begun=0.0, since=0.0)
    assert whole.firsts == set(whole.keys)


def test_the_learning_rate_of_a_step_does_not_change_within_it() -> None:
    step = begin()
    step.check_rates([step_task(ANN, {}, rate=0.1)])
    with pytest.raises(RemoteProtocolError, match=r"learning rate 9 is not that .* 0\.1"):
        step.check_rates([step_task(ANN, {}, rate=9.0)])
