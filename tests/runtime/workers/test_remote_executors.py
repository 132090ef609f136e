"""A session whose state is in a worker: when it goes there, comes back, and is lost."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest

from splitonnx.errors import (
    LocalProtocolError,
    ProcessFailed,
    StageFailed,
    StageTooSlow,
    WorkerLost,
)
from splitonnx.messages import TaskKey
from splitonnx.runtime.workers.messages import (
    Action,
    Begin,
    Continue,
    Done,
    Fetch,
    Finish,
    Open,
    Work,
)
from splitonnx.runtime.workers.processes import WorkerEnded
from splitonnx.runtime.workers.remote_executors import RemoteExecutor
from tests.support import tiny

SESSION = "a" * 32
STATE = {"W2": np.full((4, 2), 3, np.float32), "W2.m": np.zeros((4, 2), np.float32)}
WIRES = {"h": np.ones((2, 4), np.float32)}
REPLY = {"h.grad": np.ones((2, 4), np.float32)}


class Worker:
    """Answers a step's first message with wires, the next with the end, and any fetch with STATE.

    ``raises`` is raised once, at the next request.
    """

    def __init__(self) -> None:
        self.is_alive = True
        self.asked: list[Action] = []
        self.tensors: list[Mapping[str, np.ndarray] | None] = []
        self.abandoned: list[TaskKey] = []
        self.forgotten: list[int] = []
        self.raises: Exception | None = None

    def ask(
        self, action: Action, tensors: Mapping[str, np.ndarray] | None = None
    ) -> dict[str, np.ndarray] | Done:
        if self.raises is not None:
            error, self.raises = self.raises, None
            raise error
        self.asked.append(action)
        self.tensors.append(tensors)
        if isinstance(action, Work):
            return REPLY
        return STATE if isinstance(action, Fetch) else Done(is_finished=True)

    def abandon(self, session: int, key: TaskKey) -> None:
        self.abandoned.append(key)

    def forget(self, session: int) -> None:
        self.forgotten.append(session)


class Pool:
    """Gives one worker, and notes what became of tasks."""

    def __init__(self) -> None:
        self.party = tiny.split_bundle().parties["server"]
        self.worker = Worker()
        self.fails: Exception | None = None
        self.deaths: list[TaskKey | None] = []
        self.made: list[TaskKey] = []
        self.closed: list[RemoteExecutor] = []

    def get_worker(self, executor: RemoteExecutor) -> Worker:
        if self.fails is not None:
            raise self.fails
        return self.worker

    def close_executor(self, executor: RemoteExecutor) -> None:
        self.closed.append(executor)

    def note_death(self, key: TaskKey | None, session: str, how: str) -> WorkerLost:
        self.deaths.append(key)
        return WorkerLost(session, how)

    def note_success(self, key: TaskKey) -> None:
        self.made.append(key)

    def note_failed_start(self, key: TaskKey | None, session: str, why: str) -> WorkerLost:
        self.deaths.append(key)
        return WorkerLost(session, why, is_early=True)


@pytest.fixture
def pool() -> Pool:
    return Pool()


@pytest.fixture
def executor(pool: Pool) -> RemoteExecutor:
    return open_executor(pool)


def open_executor(pool: Pool, tensors: Mapping[str, np.ndarray] | None = None) -> RemoteExecutor:
    return RemoteExecutor(pool, f"session {SESSION}", SESSION, tensors, 0)  # type: ignore[arg-type]


def begin(executor: RemoteExecutor) -> TaskKey:
    key = TaskKey(SESSION, "train", executor.step, 0)
    executor.begin(key, data={}, seed=5, learning_rate=0.5)
    executor.deliver(key, WIRES)
    return key


def kinds(pool: Pool) -> list[str]:
    return [type(action).__name__ for action in pool.worker.asked]


def test_nothing_is_sent_before_the_first_task_advances(
    executor: RemoteExecutor, pool: Pool
) -> None:
    assert executor.state().keys() == STATE.keys()
    begin(executor)
    assert pool.worker.asked == []
    assert executor.is_loaded  # from now on it cannot be unloaded


def test_a_step_is_opened_worked_on_and_committed(executor: RemoteExecutor, pool: Pool) -> None:
    key = begin(executor)
    assert list(executor.advance(key)) == [REPLY]
    assert executor.is_finished(key)
    assert executor.step == 0
    assert executor.finish(key) == {}
    assert executor.step == 1
    assert kinds(pool) == ["Open", "Work", "Continue", "Finish"]
    work = pool.worker.asked[1]
    assert isinstance(work, Work)
    assert work.begin == Begin(seed=5, learning_rate=0.5)
    assert pool.worker.tensors[1] is WIRES
    assert pool.made == [key]


def test_a_session_is_opened_once_and_its_task_begun_once(
    executor: RemoteExecutor, pool: Pool
) -> None:
    key = begin(executor)
    list(executor.advance(key))
    executor.deliver(key, WIRES)
    list(executor.advance(key))
    assert kinds(pool) == ["Open", "Work", "Continue", "Work", "Continue"]
    again = pool.worker.asked[3]
    assert isinstance(again, Work)
    assert again.begin is None


def test_what_an_executor_in_this_process_refuses_is_refused(executor: RemoteExecutor) -> None:
    key = TaskKey(SESSION, "train", 0, 0)
    with pytest.raises(LocalProtocolError, match="not open"):
        executor.deliver(key, WIRES)
    with pytest.raises(LocalProtocolError, match="wires alone"):
        executor.begin(key, data=WIRES, seed=0, learning_rate=0.1)
    begin(executor)
    with pytest.raises(LocalProtocolError, match="open already"):
        begin(executor)
    with pytest.raises(LocalProtocolError, match="not finished"):
        executor.finish(key)


def test_a_prediction_is_no_step(executor: RemoteExecutor) -> None:
    key = TaskKey(SESSION, "predict", 7, 0)
    executor.begin(key, data={}, seed=0, learning_rate=0.1)
    list(executor.advance(key))
    executor.finish(key)
    assert executor.step == 0


def test_a_task_that_the_worker_never_heard_of_is_given_up_without_a_word(
    executor: RemoteExecutor, pool: Pool
) -> None:
    executor.abandon(begin(executor))
    assert pool.worker.abandoned == []
    key = begin(executor)
    next(executor.advance(key))
    executor.abandon(key)
    executor.abandon(key)
    assert pool.worker.abandoned == [key]


def test_a_state_is_fetched_so_that_the_worker_may_be_another_s_and_goes_back_with_the_next_task(
    executor: RemoteExecutor, pool: Pool
) -> None:
    key = begin(executor)
    list(executor.advance(key))
    assert not executor.unload(waits=True)  # its task is open
    executor.finish(key)
    assert executor.unload(waits=True)
    assert not executor.is_loaded
    assert executor.state() == STATE
    asked = len(pool.worker.asked)
    list(executor.advance(begin(executor)))
    opened = pool.worker.asked[asked]
    assert isinstance(opened, Open)
    assert opened.step == 1
    assert pool.worker.tensors[asked] is STATE
    assert pool.worker.forgotten
    assert opened.session not in pool.worker.forgotten


def test_a_state_that_cannot_be_fetched_stays_where_it_is(
    executor: RemoteExecutor, pool: Pool
) -> None:
    key = begin(executor)
    list(executor.advance(key))
    executor.finish(key)
    pool.worker.raises = StageFailed("of the task", "no memory")
    assert not executor.unload(waits=True)
    assert executor.is_loaded


def test_where_the_worker_ended_meanwhile_the_session_is_lost_and_not_in_the_way(
    executor: RemoteExecutor, pool: Pool
) -> None:
    key = begin(executor)
    list(executor.advance(key))
    executor.finish(key)
    pool.worker.is_alive = False
    assert executor.unload(waits=True)
    assert executor.is_lost


@pytest.mark.parametrize("is_before", [False, True])
def test_a_worker_s_end_is_held_against_the_task_that_it_was_at_and_no_other(
    executor: RemoteExecutor, pool: Pool, is_before: bool
) -> None:
    key = begin(executor)
    list(executor.advance(key))
    pool.worker.raises = WorkerEnded("it was ended", is_before=is_before)
    with pytest.raises(WorkerLost, match="it was ended"):
        executor.finish(key)
    assert pool.deaths == [None if is_before else key]


def test_a_worker_that_cannot_be_started_is_a_lost_one(
    executor: RemoteExecutor, pool: Pool
) -> None:
    pool.fails = ProcessFailed("worker", "no such file")
    key = begin(executor)
    with pytest.raises(WorkerLost) as caught:
        next(executor.advance(key))
    assert caught.value.is_early
    assert pool.deaths == [key]


@pytest.mark.parametrize("is_alive", [True, False])
def test_a_stage_that_took_too_long_is_counted_as_an_end_only_where_it_was_one(
    executor: RemoteExecutor, pool: Pool, is_alive: bool
) -> None:
    key = begin(executor)
    list(executor.advance(key))
    pool.worker.raises = StageTooSlow("body.step", 1.0)
    pool.worker.is_alive = is_alive
    with pytest.raises(StageTooSlow):
        executor.finish(key)
    assert pool.deaths == ([] if is_alive else [None])


def test_another_state_takes_the_place_of_one_in_a_worker_and_of_its_tasks(
    executor: RemoteExecutor, pool: Pool
) -> None:
    key = begin(executor)
    list(executor.advance(key))
    executor.restore(STATE, 9)
    assert executor.step == 9
    assert executor.state() == STATE
    assert len(pool.worker.forgotten) == 1
    with pytest.raises(LocalProtocolError):
        executor.is_finished(key)


def test_untrained_is_what_the_bundle_begins_with(pool: Pool) -> None:
    state = open_executor(pool).state()
    np.testing.assert_array_equal(state["W2"], tiny.WEIGHTS["W2"])
    assert not state["W2.m"].any()


def test_closing_tells_the_worker_and_the_pool(executor: RemoteExecutor, pool: Pool) -> None:
    list(executor.advance(begin(executor)))
    executor.close()
    assert len(pool.worker.forgotten) == 1
    assert pool.closed == [executor]


def test_each_session_has_a_number_of_its_own(pool: Pool) -> None:
    for executor in (open_executor(pool), open_executor(pool)):
        list(executor.advance(begin(executor)))
    opened = [action.session for action in pool.worker.asked if isinstance(action, Open)]
    assert len(set(opened)) == 2
    assert {type(action) for action in pool.worker.asked} == {Open, Work, Continue}
    assert not any(isinstance(action, Finish) for action in pool.worker.asked)


def accumulate(executor: RemoteExecutor, micro_batch: int) -> TaskKey:
    key = TaskKey(SESSION, "accumulate", 0, micro_batch)
    executor.begin(key, data={}, seed=0, learning_rate=0.1)
    executor.deliver(key, WIRES)
    assert list(executor.advance(key)) == [REPLY]
    assert executor.finish(key) == {}
    return key


def test_between_two_micro_batches_the_state_stays_in_the_worker(
    executor: RemoteExecutor, pool: Pool
) -> None:
    accumulate(executor, 0)
    assert executor.step == 0
    assert executor.is_loaded
    assert not executor.unload(waits=True)  # what was accumulated cannot be fetched
    update = TaskKey(SESSION, "update", 0, 1)
    executor.begin(update, data={}, seed=0, learning_rate=0.1)
    executor.deliver(update, WIRES)
    list(executor.advance(update))
    executor.finish(update)
    assert executor.step == 1
    assert executor.unload(waits=True)


def test_a_step_that_is_given_up_between_two_micro_batches_is_given_up_in_the_worker(
    executor: RemoteExecutor, pool: Pool
) -> None:
    key = accumulate(executor, 0)
    executor.abandon(key)
    assert pool.worker.abandoned == [key]
    executor.abandon(key)  # once is enough
    assert pool.worker.abandoned == [key]
    assert executor.unload(waits=True)


def test_giving_up_one_micro_batch_gives_up_the_others_that_are_open(
    executor: RemoteExecutor, pool: Pool
) -> None:
    keys = [TaskKey(SESSION, "accumulate", 0, number) for number in range(2)]
    for key in keys:
        executor.begin(key, data={}, seed=0, learning_rate=0.1)
        executor.deliver(key, WIRES)
        assert executor.is_waiting(key)  # it was not sent to the worker
    assert list(executor.advance(keys[0])) == [REPLY]
    executor.abandon(keys[1])
    assert pool.worker.abandoned == [keys[1]]
    with pytest.raises(LocalProtocolError, match="not open"):
        executor.is_finished(keys[0])
    assert executor.unload(waits=True)
