"""The memory for tasks: who gets it, who waits, and whose is taken back."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from splitonnx.errors import ServerBusy, TaskTooLarge
from splitonnx.runtime.scheduling.budgets import IDLE_SECONDS, RESERVE, UPLOAD_SECONDS, Budget
from splitonnx.runtime.scheduling.places import TENURE_SECONDS
from tests.support.echoes import PATIENCE


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def run(test: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(_run(test))


async def _run(test: Callable[[], Awaitable[None]]) -> None:
    await test()


def task(name: str) -> tuple[str, str]:
    return name, "train"


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


def test_a_message_of_a_task_that_is_not_open_is_remembered_by_nobody() -> None:
    async def test() -> None:
        budget = Budget(1000)
        for size in range(1, 100):
            budget.extend(task("e"), "eve", size)
            budget.release(task("e"))
        assert not budget._growths._most

    run(test)


def test_an_open_task_that_begins_anew_is_given_up_where_its_kind_grew_beyond_it() -> None:
    async def test() -> None:
        budget = Budget(100)
        budget.ask(task("a"), "ana", 40)
        budget.ask(task("e"), "eve", 50)
        with pytest.raises(ServerBusy):
            budget.extend(task("a"), "ana", 60)
        assert budget.lacks(task("a"), "ana", 40)

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
