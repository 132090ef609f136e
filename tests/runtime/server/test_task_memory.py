"""The memory of one connection's tasks: kept while a task is open, whoever says it again."""

from __future__ import annotations

import asyncio
from typing import cast

import msgspec
import pytest

from splitonnx.errors import ServerBusy, TaskTooLarge
from splitonnx.messages import TaskKey, Tensors
from splitonnx.runtime.edge.websockets import Peer
from splitonnx.runtime.scheduling.budgets import Budget
from splitonnx.runtime.server.contexts import ServerContext
from splitonnx.runtime.server.ledgers import Fingerprint, Ledger
from splitonnx.runtime.server.sessions import Session
from splitonnx.runtime.server.task_memory import TaskMemory


class OpenSession:
    """A session with an open step; notes what of it is given up."""

    def __init__(self, name: str) -> None:
        self.id = name
        self.given_up: list[str] = []
        self.open_phases: frozenset[str] = frozenset({"train"})
        self.open_tasks: tuple[TaskKey, ...] = ()
        self.awaits_others = self.is_joint = False
        self.ledger = Ledger(0, 3)

    def give_up(self, phase: str) -> None:
        self.given_up.append(phase)


class Shared:
    def __init__(self, budget: Budget) -> None:
        self.budget = budget
        self.waiting: set[str] = set()

    def give_up_idle(self) -> None:
        """Nobody is idle for long enough."""


def make_first(name: str) -> Tensors:
    return Tensors(
        session=name, phase="train", step=0, micro_batch=0, turn=0, seed=0, learning_rate=0.1
    )


async def reserve(memory: TaskMemory, session: OpenSession, size: int) -> None:
    await memory.reserve(cast("Session", session), session.id, make_first(session.id), size)


def make_memory(budget: Budget, never: asyncio.Task[None]) -> TaskMemory:
    """Make the memory of a connection that stays, at a server that goes on."""
    return TaskMemory(
        cast("ServerContext", Shared(budget)),
        cast("Peer", None),
        gone=never,
        stopping=cast("asyncio.Task[bool]", never),
    )


async def check_repeats(size: int) -> tuple[list[str], int, bool]:
    """Open a step of 60 bytes, let another one wait, and begin the first again with ``size``."""
    budget = Budget(100)
    never = asyncio.create_task(asyncio.sleep(3600))
    memory = make_memory(budget, never)
    first, second = OpenSession("a"), OpenSession("b")
    await reserve(memory, first, 60)
    waiting = asyncio.create_task(reserve(memory, second, 60))
    await asyncio.sleep(0)
    again = asyncio.create_task(reserve(memory, first, size))
    await asyncio.sleep(0)
    ended = first.given_up, budget.used, waiting.done()
    for task in (never, waiting, again):
        task.cancel()
    await asyncio.wait((never, waiting, again))
    return ended


def test_a_step_that_is_begun_again_with_the_same_keeps_its_memory() -> None:
    assert asyncio.run(check_repeats(60)) == ([], 60, False)


def test_a_step_that_begins_again_with_more_is_given_up_before_its_memory_is_free() -> None:
    given_up, used, _ = asyncio.run(check_repeats(90))
    assert given_up == ["train"]
    assert used == 60  # the other one's


async def list_idle(*, awaits_others: bool) -> list[object]:
    """Open a step, settle it, and list what is idle after a long time."""
    now = [0.0]
    budget = Budget(100, clock=lambda: now[0])
    never = asyncio.create_task(asyncio.sleep(3600))
    memory = make_memory(budget, never)
    session = OpenSession("a")
    session.awaits_others = awaits_others
    await reserve(memory, session, 60)
    memory.settle(cast("Session", session))
    now[0] = 1e6
    waiting = budget.ask(("b", "train"), "b", 60)  # else nothing needs to be idle
    idle: list[object] = list(budget.list_idle())
    assert budget.used == 60
    waiting.cancel()
    session.open_phases, session.awaits_others = frozenset(), False
    memory.settle(cast("Session", session))
    assert budget.used == 0
    never.cancel()
    return idle


def test_a_step_whose_client_is_silent_is_idle_and_one_that_waits_for_others_is_not() -> None:
    assert asyncio.run(list_idle(awaits_others=False)) == [("a", "train")]
    assert asyncio.run(list_idle(awaits_others=True)) == []


def make_part(name: str, number: int, turn: int = 0, phase: str = "accumulate") -> Tensors:
    return msgspec.structs.replace(make_first(name), phase=phase, micro_batch=number, turn=turn)


async def have_open(budget: Budget, sizes: list[tuple[int, int, int]], *ended: int) -> Budget:
    """Send messages of micro-batches: their numbers, turns and sizes; some end before the last."""
    never = asyncio.create_task(asyncio.sleep(3600))
    memory = make_memory(budget, never)
    session = OpenSession("a")
    session.open_phases = frozenset({"accumulate"})
    open_tasks: dict[int, TaskKey] = {}
    for index, (number, turn, size) in enumerate(sizes):
        if index == len(sizes) - 1:
            open_tasks = {n: key for n, key in open_tasks.items() if n not in ended}
        message = make_part("a", number, turn)
        session.open_tasks = tuple(open_tasks.values())
        await memory.reserve(cast("Session", session), "a", message, size)
        open_tasks[number] = message.key
    never.cancel()
    return budget


@pytest.mark.parametrize(
    ("sizes", "ended", "used"),
    [
        ([(0, 0, 10), (1, 0, 10), (2, 0, 10)], (), 30),
        ([(0, 0, 10), (1, 0, 10), (0, 1, 25)], (), 35),  # a later message tells more sizes
        ([(0, 0, 10), (1, 0, 10), (2, 0, 10)], (0,), 20),
        ([(0, 0, 10), (1, 0, 10), (2, 0, 10)], (0, 1), 20),  # the most that were open at once
    ],
)
def test_each_open_micro_batch_has_its_memory(
    sizes: list[tuple[int, int, int]], ended: tuple[int, ...], used: int
) -> None:
    assert asyncio.run(have_open(Budget(100), sizes, *ended)).used == used


def test_the_replies_that_are_kept_count() -> None:
    ledger = Ledger(0, 2)
    kept = []
    for number in range(3):
        ledger.begin(Fingerprint(b"message"), ends_step=False)
        ledger.answer([b"reply", memoryview(b"again")], 0, 0, number)
        ledger.commit()
        kept.append(ledger.kept_bytes)
    assert kept == [10, 20, 20]  # of as many tasks as may be open

    async def reserve_after() -> int:
        budget, never = Budget(100), asyncio.create_task(asyncio.sleep(3600))
        memory = TaskMemory(
            cast("ServerContext", Shared(budget)),
            cast("Peer", None),
            gone=never,
            stopping=cast("asyncio.Task[bool]", never),
        )
        session = OpenSession("a")
        session.ledger = ledger
        await memory.reserve(cast("Session", session), "a", make_part("a", 3), 30)
        never.cancel()
        return budget.used

    assert asyncio.run(reserve_after()) == 50


def test_open_micro_batches_together_do_not_exceed_the_limit() -> None:
    with pytest.raises(TaskTooLarge):
        asyncio.run(have_open(Budget(100), [(number, 0, 30) for number in range(4)]))


def test_a_micro_batch_does_not_wait_for_memory_that_its_own_step_holds() -> None:
    budget = Budget(100)

    async def others_hold() -> None:
        await budget.ask(("b", "train"), "b", 50)
        await have_open(budget, [(0, 0, 30), (1, 0, 30)])

    with pytest.raises(ServerBusy):
        asyncio.run(others_hold())

    async def again() -> None:
        waiting = budget.ask(("a", "accumulate"), "a", 30)
        assert not waiting.done()  # the step now asks for what it needed before
        budget.release(("b", "train"))
        await waiting
        assert budget.used == 60

    budget.release(("a", "accumulate"))
    asyncio.run(again())
