"""Turns between owners: the order in which pieces of work run, without a clock and in threads."""

from __future__ import annotations

import asyncio
import gc
import threading
import weakref
from collections import Counter
from collections.abc import Mapping

import numpy as np
import pytest

from splitonnx.runtime.scheduling.turns import LEAST_COUNTED, SHORT, FairQueue, Turns


def serve(queue: FairQueue[str], seconds: Mapping[str, float], pieces: int) -> list[str]:
    """Run so many pieces one after the other; give their owners."""
    owners = []
    for _ in range(pieces):
        owner = _take_owner(queue)
        owners.append(owner)
        queue.finish(owner, seconds[owner])
    return owners


def fill(queue: FairQueue[str], owner: str, pieces: int) -> None:
    for number in range(pieces):
        queue.add(owner, f"{owner}{number}")


def test_an_owner_s_pieces_run_in_order_and_one_at_a_time() -> None:
    queue: FairQueue[str] = FairQueue(4)
    fill(queue, "ana", 3)
    assert queue.take() == ("ana", "ana0")
    assert queue.take() is None
    queue.finish("ana", 1.0)
    assert queue.take() == ("ana", "ana1")


def test_no_more_pieces_run_than_there_are_places() -> None:
    queue: FairQueue[str] = FairQueue(2)
    for owner in ("ana", "ben", "eve"):
        fill(queue, owner, 1)
    assert [queue.take(), queue.take(), queue.take()] == [("ana", "ana0"), ("ben", "ben0"), None]
    queue.finish("ana", 1.0)
    assert queue.take() == ("eve", "eve0")


def test_a_flood_of_one_owner_does_not_keep_the_others_waiting() -> None:
    queue: FairQueue[str] = FairQueue(1)
    fill(queue, "eve", 1000)
    assert serve(queue, {"eve": 1.0}, 10) == ["eve"] * 10
    fill(queue, "ana", 5)
    order = serve(queue, {"eve": 1.0, "ana": 1.0}, 10)
    assert Counter(order) == {"ana": 5, "eve": 5}
    assert order[:2].count("ana") == 1


def test_owners_get_the_same_time_whatever_their_pieces_take() -> None:
    queue: FairQueue[str] = FairQueue(1)
    seconds = {"eve": 10.0, "ana": 1.0, "ben": 2.0}
    for owner in seconds:
        fill(queue, owner, 1000)
    served = Counter(serve(queue, seconds, 800))
    used = [count * seconds[owner] for owner, count in served.items()]
    assert max(used) - min(used) <= 10.0


def test_short_pieces_count_alike_however_long_they_waited_for_a_cpu() -> None:
    queue: FairQueue[str] = FairQueue(1)
    owners = [f"client{number}" for number in range(20)]
    for owner in owners:
        fill(queue, owner, 100)
    measured = np.random.default_rng(0).exponential(LEAST_COUNTED / 8, 1000).clip(0, LEAST_COUNTED)
    turns = Counter[str]()
    for seconds in measured:
        owner = _take_owner(queue)
        queue.finish(owner, float(seconds))
        turns[owner] += 1
    assert [turns[owner] for owner in owners] == [50] * 20


def test_an_owner_that_comes_back_starts_level_and_has_saved_nothing_up() -> None:
    queue: FairQueue[str] = FairQueue(1)
    seconds = {"ana": 1.0, "ben": 1.0}
    fill(queue, "ana", 1)
    serve(queue, seconds, 1)
    fill(queue, "ben", 200)
    serve(queue, seconds, 100)
    fill(queue, "ana", 50)
    assert Counter(serve(queue, seconds, 20)) == {"ana": 10, "ben": 10}


def test_who_used_much_in_a_pause_of_the_others_owes_nothing_once_all_were_idle() -> None:
    queue: FairQueue[str] = FairQueue(1)
    fill(queue, "eve", 1)
    serve(queue, {"eve": 300.0}, 1)
    fill(queue, "ana", 10)
    fill(queue, "eve", 10)
    assert Counter(serve(queue, {"ana": 1.0, "eve": 1.0}, 10)) == {"ana": 5, "eve": 5}


def test_short_pieces_have_a_place_that_long_ones_cannot_take() -> None:
    queue: FairQueue[str] = FairQueue(1)
    fill(queue, "ana", 5)
    assert serve(queue, {"ana": SHORT}, 1) == ["ana"]
    fill(queue, "eve", 5)
    fill(queue, "ida", 5)
    assert _take_owner(queue) == "eve"  # the one place
    assert _take_owner(queue) == "ana"  # beside it
    assert queue.take() is None  # nothing is known of ida's pieces
    queue.finish("ana", 2 * SHORT)
    assert queue.take() is None  # nor is ana any more


def test_short_pieces_never_keep_a_long_one_from_the_places_that_are_anybody_s() -> None:
    """There are always short ones waiting, one more than places."""
    queue: FairQueue[str] = FairQueue(1)
    short = ["ana", "ben", "cleo"]
    for owner in short:
        fill(queue, owner, 1000)
        serve(queue, dict.fromkeys(short, SHORT), 1)
    serve(queue, dict.fromkeys(short, SHORT), 6)
    running = [_take_owner(queue), _take_owner(queue)]
    fill(queue, "ida", 1)
    for _ in range(20):
        queue.finish(running.pop(0), SHORT)
        running.append(_take_owner(queue))
        if running[-1] == "ida":
            return
    raise AssertionError("ida never had a turn")


def _take_owner(queue: FairQueue[str]) -> str:
    taken = queue.take()
    assert taken is not None
    return str(taken[0])


def test_owners_who_left_are_forgotten() -> None:
    queue: FairQueue[str] = FairQueue(1)
    for number in range(5000):
        fill(queue, f"user {number}", 1)
        serve(queue, {f"user {number}": 1.0}, 1)
    assert len(queue._lines) < 2000


def test_a_piece_gives_its_result_or_its_error() -> None:
    async def run() -> None:
        turns = Turns(1)
        assert await turns.run("ana", lambda: 7) == 7
        with pytest.raises(ZeroDivisionError):
            await turns.run("ana", lambda: 1 / 0)
        assert await turns.run("ana", lambda: 8) == 8  # the place is free again
        turns.close()

    asyncio.run(run())


def test_waiting_holds_no_thread_and_what_runs_is_bounded() -> None:
    release, running = threading.Event(), []

    def work() -> int:
        running.append(threading.current_thread())
        release.wait()
        return threading.active_count()

    async def run() -> list[int]:
        before = threading.active_count()
        turns = Turns(2)
        pieces = [turns.run(owner, work) for owner in range(100)]
        while len(running) < 2:
            await asyncio.sleep(0)
        assert threading.active_count() <= before + 2
        release.set()
        counts = await asyncio.gather(*pieces)
        turns.close()
        return [count - before for count in counts]

    assert max(asyncio.run(run())) <= 3  # a place for short ones beside the two


def test_the_clock_decides_who_has_used_the_least() -> None:
    """One thread's time is that of the clock, which pieces move."""
    now = 0.0
    order: list[str] = []

    def spend(owner: str, seconds: float) -> None:
        nonlocal now
        now += seconds
        order.append(owner)

    async def run() -> None:
        turns = Turns(1, clock=lambda: now)
        pieces = [turns.run("eve", lambda: spend("eve", 10.0)) for _ in range(3)]
        pieces += [turns.run("ana", lambda: spend("ana", 1.0)) for _ in range(15)]
        await asyncio.gather(*pieces)
        turns.close()

    asyncio.run(run())
    assert order == ["eve", *["ana"] * 10, "eve", *["ana"] * 5, "eve"]


class Content:
    """What a piece that waits keeps alive."""


def test_a_piece_whose_connection_is_gone_is_withdrawn_and_its_memory_given_back() -> None:
    ran: list[str] = []
    release = threading.Event()

    async def run() -> None:
        turns = Turns(1)
        first = turns.run("eve", release.wait)
        content = Content()
        alive = weakref.ref(content)
        second = turns.run("eve", lambda kept=content: ran.append(str(kept)))  # type: ignore[misc]
        third = turns.run("eve", lambda: ran.append("third"))
        assert turns.withdraw(second)
        assert not turns.withdraw(first)  # it runs
        del content, second
        await asyncio.sleep(0)  # callbacks of the cancelled future
        gc.collect()
        assert alive() is None
        release.set()
        await third
        await first
        turns.close()

    asyncio.run(run())
    assert ran == ["third"]


def test_a_cancelled_piece_neither_runs_nor_blocks_the_rest() -> None:
    release = threading.Event()
    ran: list[str] = []

    async def run() -> None:
        turns = Turns(1)
        first = turns.run("eve", release.wait)
        second = asyncio.ensure_future(_await(turns.run("eve", lambda: ran.append("second"))))
        third = turns.run("eve", lambda: ran.append("third"))
        await asyncio.sleep(0)
        second.cancel()
        first.cancel()  # it runs on, unheard
        await asyncio.sleep(0)
        release.set()
        await third
        turns.close()

    asyncio.run(run())
    assert ran == ["third"]


async def _await(piece: asyncio.Future[None]) -> None:
    await piece
