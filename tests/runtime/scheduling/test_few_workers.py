"""The memory for tasks where workers are few: who has one, and who passes it on."""

from __future__ import annotations

from splitonnx.runtime.scheduling.budgets import Budget
from splitonnx.runtime.scheduling.places import TENURE_SECONDS
from tests.support.budgets import Clock, run, task


def test_tasks_wait_for_a_worker_and_one_that_was_had_for_long_is_passed_on() -> None:
    async def test() -> None:
        clock = Clock()
        budget = Budget(100, workers=2, clock=clock)
        for owner in ("ana", "ben"):
            assert budget.ask(task(owner), owner, 1).done()
            budget.release(task(owner))
            clock.now += 1
        waiting = budget.ask(task("cleo"), "cleo", 1)
        assert budget.ask(task("ana"), "ana", 1).done()  # who has one keeps it for a time
        budget.release(task("ana"))
        assert not waiting.done()
        clock.now = TENURE_SECONDS
        assert budget.list_idle() == []
        assert waiting.done()
        assert budget.ask(task("ben"), "ben", 1).done()
        again = budget.ask(task("ana"), "ana", 1)
        assert not again.done()

    run(test)


def test_who_always_has_a_task_open_passes_the_worker_on_all_the_same() -> None:
    async def test() -> None:
        clock = Clock()
        budget = Budget(100, workers=1, clock=clock)
        assert budget.ask(task("e0"), "eve", 1).done()
        clock.now = TENURE_SECONDS
        waiting = budget.ask(task("a"), "ana", 1)
        more = budget.ask(task("e1"), "eve", 1)
        assert not more.done()  # or there would always be one
        budget.release(task("e0"))
        assert waiting.done()
        assert not more.done()

    run(test)


def test_sessions_of_those_whom_nothing_tells_apart_take_a_worker_each_for_all_phases() -> None:
    async def test() -> None:
        budget = Budget(100, workers=1)
        assert budget.ask(("s", "train"), object(), 1).done()
        assert budget.ask(("s", "predict"), object(), 1).done()
        assert not budget.ask(("t", "train"), object(), 1).done()

    run(test)


def test_a_worker_s_place_is_free_once_its_user_has_no_session() -> None:
    async def test() -> None:
        there = {"ana", "ben"}
        budget = Budget(100, workers=2, is_there=there.__contains__, clock=Clock())
        for owner in ("ana", "ben"):
            assert budget.ask(task(owner), owner, 10).done()
            budget.release(task(owner))
        waiting = budget.ask(task("carl"), "carl", 10)
        assert not waiting.done()  # both may come back, and have had their places for no time
        there.remove("ana")
        budget.list_idle()
        assert waiting.done()
        assert not budget.ask(task("dora"), "dora", 10).done()

    run(test)
