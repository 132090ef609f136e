"""A client's account of an open task: which answer is due, and which is refused."""

from __future__ import annotations

import msgspec
import pytest

from splitonnx.errors import RemoteProtocolError
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
    assert [task.take(answer(turn)) for turn in range(3)] == [True, True, True]
    assert task.due == task.received == 3


@pytest.mark.parametrize("turn", [0, 2, 5])
def test_an_answer_that_came_before_or_comes_too_early_is_refused(turn: int) -> None:
    task = OpenTask(key=KEY)
    task.take(answer(0))
    with pytest.raises(RemoteProtocolError, match=f"message {turn} where 1 was due"):
        task.take(answer(turn))
    task.take(answer(1))  # what was refused counts for nothing


@pytest.mark.parametrize(
    "other", [{"session": "6" * 32}, {"phase": "predict"}, {"step": 4}, {"micro_batch": 1}]
)
def test_an_answer_to_another_task_is_refused(other: dict[str, object]) -> None:
    task = OpenTask(key=KEY)
    with pytest.raises(RemoteProtocolError, match="open is"):
        task.take(msgspec.structs.replace(answer(0), **other))
    assert task.due == 0
    tasks = SentTasks()
    tasks.record(KEY, {}, 0, 0.1)
    with pytest.raises(RemoteProtocolError, match="open is"):
        tasks.find_answered(msgspec.structs.replace(answer(0), **other))
    assert tasks.find_answered(answer(0)).key == KEY


def test_on_a_new_connection_every_answer_may_come_once_more_and_is_not_new() -> None:
    tasks = SentTasks()
    tasks.record(KEY, {}, 0, 0.1)
    task = tasks.find_answered(answer(0))
    assert task.take(answer(0))
    assert [sent.turn for sent, _ in tasks.repeat()] == [0]
    assert not task.take(answer(0))
    with pytest.raises(RemoteProtocolError):
        task.take(answer(0))
    assert task.take(answer(1))


def test_messages_of_several_tasks_are_repeated_in_the_order_in_which_they_were_sent() -> None:
    tasks = SentTasks()
    keys = [msgspec.structs.replace(KEY, phase="accumulate", micro_batch=n) for n in range(3)]
    for number in (0, 1, 0, 2, 1):
        tasks.record(keys[number], {}, 0, 0.1)
    assert tasks.count == 3
    assert [(sent.micro_batch, sent.turn) for sent, _ in tasks.repeat()] == [
        (0, 0),
        (1, 0),
        (0, 1),
        (2, 0),
        (1, 1),
    ]
    tasks.end(keys[0])
    assert tasks.micro_batch == 1
    assert [(sent.micro_batch, sent.turn) for sent, _ in tasks.repeat()] == [(1, 0), (2, 0), (1, 1)]


def end_task(tasks: SentTasks, phase: str, step: int, micro_batch: int = 0) -> None:
    key = TaskKey("a" * 32, phase, step, micro_batch)
    tasks.record(key, {}, 0, 0.1)
    tasks.end(key)


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
    assert tasks.micro_batch == 1
    assert tasks.find_last(5) is not None
    second = TaskKey("a" * 32, "accumulate", 5, 1)
    message = tasks.record(second, {}, 0, 0.1)
    assert (found := tasks.find_last(5)) is not None
    assert found.key.micro_batch == 0
    tasks.note_reply(tasks.find_answered(message))
    assert tasks.find_last(5) is None


def test_a_step_that_was_given_up_begins_at_its_first_micro_batch() -> None:
    tasks = SentTasks()
    end_task(tasks, "accumulate", 5, 0)
    tasks.record(TaskKey("a" * 32, "accumulate", 5, 1), {}, 0, 0.1)
    tasks.end_all()
    assert tasks.micro_batch == 0
    assert tasks.find_last(5) is None


def test_a_reply_to_a_task_that_was_open_when_the_last_one_ended_does_not_confirm_it() -> None:
    tasks = SentTasks()
    first, second, third = (TaskKey("a" * 32, "accumulate", 5, n) for n in range(3))
    tasks.record(first, {}, 0, 0.1)
    beside = tasks.record(second, {}, 0, 0.1)
    tasks.end(first)
    tasks.note_reply(tasks.find_answered(beside))
    assert tasks.find_last(5) is not None
    later = tasks.record(third, {}, 0, 0.1)
    tasks.note_reply(tasks.find_answered(later))
    assert tasks.find_last(5) is None


def test_an_update_is_confirmed_and_not_repeated() -> None:
    tasks = SentTasks()
    end_task(tasks, "update", 5, 2)
    assert tasks.find_last(6) is None
