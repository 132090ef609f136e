"""Tasks that run at the same time have a process for native code each, and fail in order."""

from __future__ import annotations

import os
from contextvars import ContextVar
from threading import Event

import pytest

from splitonnx.errors import NativeCrash, ProcessFailed
from splitonnx.partitioner.native import natives, workers
from splitonnx.partitioner.native.companions import run_together
from tests.partitioner.native.test_workers import build_split, infer

NAME: ContextVar[str] = ContextVar("name")


def find_process() -> int | None:
    """Return the number of the process that works for this task."""
    assert infer(build_split(3)) == [2, 3]
    return workers._CURRENT.get().pid


def test_results_come_in_order_from_processes_of_their_own() -> None:
    mine = find_process()
    first, second, third = run_together([find_process] * 3)
    assert first == mine
    assert len({first, second, third}) == 3
    assert find_process() == mine
    for ended in (second, third):
        assert ended is not None
        with pytest.raises(ProcessLookupError):
            os.kill(ended, 0)
    assert run_together([]) == []


def test_tasks_run_at_the_same_time_in_the_context_of_their_caller() -> None:
    NAME.set("here")
    begun = [Event(), Event()]

    def meet(own: int) -> str:
        begun[own].set()
        assert begun[1 - own].wait(60)
        return f"{own} {NAME.get()}"

    assert run_together([lambda: meet(0), lambda: meet(1)]) == ["0 here", "1 here"]


def test_the_first_error_is_raised_and_native_code_of_other_tasks_is_ended() -> None:
    begun, ended = Event(), list[type[BaseException]]()

    def go_on() -> None:
        try:
            while True:
                infer(build_split(3))
                begun.set()
        except (NativeCrash, ProcessFailed) as error:
            ended.append(type(error))
            raise

    def fail() -> None:
        assert begun.wait(60)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_together([fail, go_on])
    assert len(ended) == 1


def test_an_error_of_another_task_is_raised_too() -> None:
    def crash() -> list[int]:
        return infer(build_split(1))

    with pytest.raises(NativeCrash, match="broke down"):
        run_together([lambda: infer(build_split(3)), crash])
    assert infer(build_split(3)) == [2, 3]


def test_nothing_is_called_for_what_was_abandoned() -> None:
    isolation = workers.Isolation()
    isolation.abandon()
    with pytest.raises(ProcessFailed, match="has ended"):
        isolation.call(natives.check_form, "the split", build_split(3))
