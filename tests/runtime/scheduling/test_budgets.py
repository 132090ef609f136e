"""The memory for tasks: who gets it, who waits, and whose is taken back."""

from __future__ import annotations

import asyncio

import pytest

from splitonnx.errors import TaskTooLarge
from splitonnx.runtime.scheduling.budgets import IDLE_SECONDS, RESERVE, UPLOAD_SECONDS, Budget
from tests.support.budgets import Clock, run, task
from tests.support.echoes import PATIENCE


def test_a_task_larger_than_all_there_is_is_refused() -> None:
    async def test() -> None:
        budget = Budget(100)
        with pytest.raises(TaskTooLarge) as caught:
            budget.ask(task("a"), "ana", 101)
        assert (caught.value.needed, caught.value.limit) == (101, 100)
        assert budget.used == 0

    run(test)


def test_tasks_wait_until_there_is_room() -> None:
    async def test() -> None:
        budget = Budget(100)
        assert budget.ask(task("a"), "ana", 70).done()
        waiting = budget.ask(task("b"), "ben", 40)
        assert not waiting.done()
        budget.release(task("a"))
        assert waiting.done()
        assert budget.used == 40

    run(test)


def test_nobody_passes_a_large_task_that_waits() -> None:
    async def test() -> None:
        budget = Budget(100)
        budget.ask(task("a"), "ana", 60)
        large = budget.ask(task("b"), "ben", 80)
        small = budget.ask(task("c"), "cleo", 20)
        assert not small.done()
        budget.release(task("a"))
        assert large.done()
        assert small.done()

    run(test)


def test_owners_take_turns_however_many_tasks_one_has_waiting() -> None:
    async def test() -> None:
        budget = Budget(100)
        budget.ask(task("e0"), "eve", 100)
        waiting = [budget.ask(task(f"e{n}"), "eve", 100) for n in range(1, 9)]
        honest = budget.ask(task("a"), "ana", 100)
        budget.release(task("e0"))
        assert honest.done()
        budget.release(task("a"))
        assert [future.done() for future in waiting] == [True] + [False] * 7

    run(test)


def test_an_owner_gets_no_more_than_half_while_others_wait() -> None:
    async def test() -> None:
        budget = Budget(100)
        assert all(budget.ask(task(f"e{n}"), "eve", 20).done() for n in range(4))
        honest = budget.ask(task("a"), "ana", 30)
        more = budget.ask(task("e4"), "eve", 20)
        assert not honest.done()
        budget.release(task("e0"))
        assert honest.done()  # 60 + 30
        assert not more.done()
        budget.release(task("e1"))
        assert more.done()  # nobody else waits

    run(test)


def test_what_is_withdrawn_or_released_is_there_for_the_next() -> None:
    async def test() -> None:
        budget = Budget(100)
        budget.ask(task("a"), "ana", 80)
        gone = budget.ask(task("b"), "ben", 80)
        following = budget.ask(task("c"), "cleo", 80)
        gone.cancel()
        budget.release(task("a"))
        assert following.done()
        assert budget.used == 80

    run(test)


def test_asking_again_for_a_task_replaces_what_it_had() -> None:
    async def test() -> None:
        budget = Budget(100)
        budget.ask(task("a"), "ana", 80)
        assert budget.ask(task("a"), "ana", 90).done()
        assert budget.used == 90

    run(test)


def test_an_open_task_whose_client_is_silent_is_given_up_only_while_others_wait() -> None:
    async def test() -> None:
        clock = Clock()
        budget = Budget(100, clock=clock)
        budget.ask(task("e"), "eve", 90)
        budget.pause(task("e"))
        clock.now = 100 * IDLE_SECONDS
        assert budget.list_idle() == []  # nobody wants it
        waiting = budget.ask(task("a"), "ana", 50)
        assert budget.list_idle() == [task("e")]
        budget.release(task("e"))
        assert waiting.done()

    run(test)


def test_a_client_that_answers_in_time_keeps_its_task() -> None:
    async def test() -> None:
        clock = Clock()
        budget = Budget(100, clock=clock)
        budget.ask(task("e"), "eve", 90)
        budget.ask(task("a"), "ana", 50)
        budget.pause(task("e"))
        clock.now = IDLE_SECONDS - 1
        assert budget.list_idle() == []
        budget.extend(task("e"), "eve", 90)  # its next message
        clock.now = 2 * IDLE_SECONDS
        assert budget.list_idle() == []  # it runs

    run(test)


def test_a_request_that_is_withdrawn_lets_those_behind_it_have_its_place() -> None:
    async def test() -> None:
        budget = Budget(100)
        budget.ask(task("e"), "eve", 50)
        large, small = budget.ask(task("a"), "ana", 90), budget.ask(task("b"), "ben", 40)
        assert not small.done()  # nobody passes a large one that waits
        large.cancel()
        await asyncio.wait_for(small, PATIENCE)

    run(test)


def test_who_has_all_the_memory_keeps_no_small_task_of_others_waiting() -> None:
    """On earlier versions each step of the others waits until the task is given up, 10 s."""

    async def test() -> None:
        budget = Budget(100)
        budget.ask(task("e"), "eve", 100)
        small = 100 // RESERVE
        for _ in range(3):
            assert budget.ask(task("a"), "ana", small).done()
            budget.release(task("a"))
        assert budget.used == 100

    run(test)


def test_the_reserve_is_bounded_and_for_owners_who_have_nothing() -> None:
    async def test() -> None:
        budget = Budget(100)
        budget.ask(task("e"), "eve", 100)
        assert not budget.ask(task("e2"), "eve", 1).done()
        assert not budget.ask(task("a"), "ana", 100 // RESERVE + 1).done()
        assert budget.ask(task("b"), "ben", 10).done()
        assert not budget.ask(task("b2"), "ben", 1).done()
        assert not budget.ask(task("c"), "cleo", 10).done()

    run(test)


def test_a_client_that_sends_its_next_message_slowly_is_not_idle_until_its_time_is_over() -> None:
    """On earlier versions it is sent away after 10 s, in every step, with others beside it."""

    async def test() -> None:
        clock = Clock()
        budget = Budget(100, clock=clock)
        budget.ask(task("a"), "ana", 90)
        budget.pause(task("a"))
        budget.ask(task("e"), "eve", 50)
        clock.now = UPLOAD_SECONDS - 1
        assert budget.list_idle(lambda sent: sent == task("a")) == []
        assert budget.list_idle(lambda sent: sent == task("e")) == [task("a")]
        clock.now = UPLOAD_SECONDS
        assert budget.list_idle(lambda sent: True) == [task("a")]

    run(test)


def test_a_task_that_begins_again_keeps_what_it_has_where_that_is_enough() -> None:
    async def test() -> None:
        budget = Budget(100)
        assert budget.ask(task("a"), "ana", 70).done()
        waiting = budget.ask(task("b"), "ben", 40)
        assert budget.ask(task("a"), "ana", 70).done()  # the same message again
        assert not waiting.done()
        assert budget.used == 70
        assert not budget.lacks(task("a"), "ana", 70)
        assert budget.lacks(task("a"), "ana", 71)
        assert not budget.lacks(task("b"), "ben", 40)  # it has nothing

    run(test)


def test_others_who_come_again_and_again_pass_nobody_who_waits() -> None:
    async def test() -> None:
        budget = Budget(100)
        assert budget.ask(("small", "train"), "ana", 5).done()
        assert budget.ask(task("b"), "ben", 80).done()
        waiting = budget.ask(("large", "train"), "ana", 40)
        passed = 0
        for number in range(20):
            name = f"carl {number}"
            asked = budget.ask(task(name), "carl", 14)
            passed += asked.done()
            asked.cancel()
            budget.release(task(name))
        assert not waiting.done()
        assert passed == 1  # until then he had had nothing
        budget.release(task("b"))
        assert waiting.done()

    run(test)
