"""A client's account of an open task: which answer is due, and which is refused."""

from __future__ import annotations

import msgspec
import pytest

from splitonnx.errors import LocalProtocolError, RemoteProtocolError
from splitonnx.messages import TaskKey, Tensors
from splitonnx.runtime.channels.open_tasks import OpenTask, SentTasks

KEY = TaskKey(session="5" * 32, phase="train", step=3, micro_batch=0)


def answer(turn: int) -> Tensors:
    return Tensors(
        session=KEY.session,
        phase=KEY.phase,
        step=KEY.step,
        micro_batch=KEY.micro_batch,
        turn=turn,
        seed=0,
        learning_rate=0.1,
    )


def test_answers_are_taken_in_order() -> None:
    task = OpenTask(key=KEY)
    for turn in range(3):
        task.check(answer(turn))
    assert task.due == 3


@pytest.mark.parametrize("turn", [0, 2, 5])
def test_an_answer_that_came_before_or_comes_too_early_is_refused(turn: int) -> None:
    task = OpenTask(key=KEY)
    task.check(answer(0))
    with pytest.raises(RemoteProtocolError, match=f"message {turn} where 1 was due"):
        task.check(answer(turn))
    task.check(answer(1))  # what was refused counts for nothing


@pytest.mark.parametrize(
    "other", [{"session": "6" * 32}, {"phase": "predict"}, {"step": 4}, {"micro_batch": 1}]
)
def test_an_answer_to_another_task_is_refused(other: dict[str, object]) -> None:
    task = OpenTask(key=KEY)
    with pytest.raises(RemoteProtocolError, match="open is"):
        task.check(msgspec.structs.replace(answer(0), **other))
    assert task.due == 0


def test_on_a_new_connection_every_answer_may_come_once_more() -> None:
    task = OpenTask(key=KEY)
    task.check(answer(0))
    task.received = 1
    task.due = 0
    task.check(answer(0))
    with pytest.raises(RemoteProtocolError):
        task.check(answer(0))
    assert task.received == 1  # whether it is new is the channel's to say


def test_tasks_keep_what_they_sent_apart() -> None:
    first, second = OpenTask(key=KEY), OpenTask(key=KEY)
    first.sent.append((answer(0), {}))
    assert second.sent == []


def end_task(tasks: SentTasks, phase: str, step: int, micro_batch: int = 0) -> None:
    tasks.open = OpenTask(key=TaskKey("a" * 32, phase, step, micro_batch))
    tasks.end()


def test_the_task_before_the_next_one_is_kept_to_be_sent_again() -> None:
    tasks = SentTasks()
    end_task(tasks, "train", 4)
    assert (found := tasks.find_last(5)) is not None
    assert found.key.step == 4
    assert tasks.find_last(6) is None
    end_task(tasks, "predict", 0)  # it belongs to no step
    assert tasks.find_last(5) is found


def test_within_a_step_the_micro_batch_before_is_kept() -> None:
    tasks = SentTasks()
    end_task(tasks, "accumulate", 5, 0)
    assert tasks.find_last(5) is None  # the step would begin again, which needs none
    tasks.open = OpenTask(key=TaskKey("a" * 32, "accumulate", 5, 1))
    assert (found := tasks.find_last(5)) is not None
    assert found.key.micro_batch == 0
    tasks.note_reply()
    assert tasks.find_last(5) is None


def test_an_update_is_confirmed_and_not_repeated() -> None:
    tasks = SentTasks()
    end_task(tasks, "update", 5, 2)
    assert tasks.find_last(6) is None


def test_without_an_open_task_nothing_is_sent() -> None:
    with pytest.raises(LocalProtocolError, match="no task is open"):
        SentTasks().require_open()
