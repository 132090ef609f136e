"""The memory for tasks that grow after their first message, and for those that follow them."""

from __future__ import annotations

import pytest

from splitonnx.errors import ServerBusy, TaskTooLarge
from splitonnx.runtime.scheduling.budgets import Budget
from tests.support.budgets import run, task


def test_a_task_that_goes_on_never_waits_and_keeps_the_larger_size() -> None:
    async def test() -> None:
        budget = Budget(100)
        budget.ask(task("a"), "ana", 60)
        budget.ask(task("b"), "ben", 30)
        budget.extend(task("a"), "ana", 70)
        assert budget.used == 100
        budget.extend(task("a"), "ana", 10)
        assert budget.used == 100
        with pytest.raises(ServerBusy):  # an empty first message does not pass the limit by
            budget.extend(task("a"), "ana", 80)
        with pytest.raises(TaskTooLarge):
            budget.extend(task("a"), "ana", 101)

    run(test)


def test_what_came_out_of_the_reserve_grows_within_what_is_shared() -> None:
    async def test() -> None:
        budget = Budget(100)
        budget.ask(task("e"), "eve", 95)
        assert budget.ask(task("a"), "ana", 10).done()
        budget.extend(task("a"), "ana", 10)
        assert budget.used == 95
        with pytest.raises(ServerBusy):
            budget.extend(task("a"), "ana", 11)
        budget.release(task("e"))
        budget.extend(task("a"), "ana", 11)
        assert budget.used == 11

    run(test)


def test_who_begins_again_after_its_task_could_not_grow_begins_with_what_it_grew_to() -> None:
    """On earlier versions it begins with as little as before, and is interrupted again."""

    async def test() -> None:
        budget = Budget(100)
        budget.ask(task("e"), "eve", 50)
        budget.ask(task("a"), "ana", 40)
        with pytest.raises(ServerBusy):
            budget.extend(task("a"), "ana", 60)
        budget.release(task("a"))
        again = budget.ask(task("a"), "ana", 40)
        assert not again.done()  # 60 are not there yet
        budget.release(task("e"))
        assert again.done()
        assert budget.used == 60
        budget.extend(task("a"), "ana", 60)

    run(test)


def test_tasks_of_other_users_phases_or_first_sizes_are_not_given_what_one_grew_to() -> None:
    async def test() -> None:
        budget = Budget(1000)
        budget.ask(task("a"), "ana", 40)
        budget.extend(task("a"), "ana", 60)
        budget.release(task("a"))
        for which, owner, size in (
            (task("b"), "ben", 40),
            (("a", "predict"), "ana", 40),
            (task("a"), "ana", 41),
        ):
            assert budget.ask(which, owner, size).done()
            assert budget.used == size
            budget.release(which)
        assert budget.ask(task("a2"), "ana", 40).done()
        assert budget.used == 60

    run(test)


def test_one_large_task_does_not_let_all_that_follow_reserve_as_much() -> None:
    async def test() -> None:
        budget = Budget(1000)
        budget.ask(task("a"), "ana", 40)
        budget.extend(task("a"), "ana", 900)
        for _ in range(200):
            budget.release(task("a"))
            budget.ask(task("a"), "ana", 40)
            budget.extend(task("a"), "ana", 60)
        assert budget.used == 60

    run(test)


def test_another_s_many_sizes_and_visitors_who_have_left_leave_what_one_grew_to_known() -> None:
    async def test() -> None:
        budget = Budget(100_000, is_there=lambda user: user == "ana")
        grow(budget, "a", "ana", 40, 900)
        for number in range(2000):
            grow(budget, "e", "eve", 1000 + number, 5000)
            grow(budget, "v", f"visitor {number}", 40, 5000)
        budget.ask(task("a"), "ana", 40)
        assert budget.used == 900

    def grow(budget: Budget, name: str, owner: str, first: int, size: int) -> None:
        budget.ask(task(name), owner, first)
        budget.extend(task(name), owner, size)
        budget.release(task(name))

    run(test)


def test_a_message_of_a_task_that_is_not_open_is_remembered_by_nobody() -> None:
    async def test() -> None:
        budget = Budget(1000)
        for size in range(1, 100):
            budget.extend(task("e"), "eve", size)
            budget.release(task("e"))
        assert not budget._growths._most

    run(test)


def test_an_open_task_that_begins_again_is_given_up_where_its_kind_grew_beyond_it() -> None:
    async def test() -> None:
        budget = Budget(100)
        budget.ask(task("a"), "ana", 40)
        budget.ask(task("e"), "eve", 50)
        with pytest.raises(ServerBusy):
            budget.extend(task("a"), "ana", 60)
        assert budget.lacks(task("a"), "ana", 40)

    run(test)
