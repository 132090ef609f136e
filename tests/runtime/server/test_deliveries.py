"""What a policy has for other sessions reaches the newest connections of these."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest

from splitonnx.errors import StepEnded
from splitonnx.messages import TaskKey
from splitonnx.runtime.scheduling.budgets import Budget
from splitonnx.runtime.server import deliveries
from splitonnx.runtime.server.contexts import ServerContext
from splitonnx.runtime.server.deliveries import keep_ticking, pass_on
from splitonnx.runtime.server.policies.tasks import Delivery
from tests.support import tiny
from tests.support.registries import greet
from tests.support.server_contexts import open_context

ANN = "a" * 32
DELIVERY = Delivery(key=TaskKey(ANN, "share", 0, 0), version=0, is_last=True)


class Connection:
    """A connection that keeps what it is to deliver."""

    is_sending = False

    def __init__(self) -> None:
        self.given: list[Delivery] = []

    def dismiss(self, code: int, reason: str) -> None:
        raise AssertionError("nobody is dismissed")

    def deliver(self, delivery: Delivery) -> None:
        self.given.append(delivery)


@pytest.fixture
def context() -> Iterator[ServerContext]:
    with open_context(tiny.split_bundle()) as made:
        yield made


def test_a_delivery_is_for_the_connection_of_its_session(context: ServerContext) -> None:
    ann, bob = Connection(), Connection()
    context.holders |= {ANN: ann, "b" * 32: bob}
    pass_on(context, DELIVERY)
    assert (ann.given, bob.given) == ([DELIVERY], [])


def test_a_client_without_a_connection_asks_again(context: ServerContext) -> None:
    pass_on(context, DELIVERY)
    assert not context.holders


def test_the_session_of_a_client_without_a_connection_holds_what_comes(
    context: ServerContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: dict[str, list[Delivery]] = {}
    for name in (ANN, "b" * 32):
        session = context.registry.find(greet(name), "")
        monkeypatch.setattr(session, "hold", held.setdefault(name, []).append)
    pass_on(context, DELIVERY)
    assert held == {ANN: [DELIVERY], "b" * 32: []}
    context.holders[ANN] = Connection()
    pass_on(context, DELIVERY)
    assert held[ANN] == [DELIVERY]  # the other went to the connection


def test_a_step_that_ends_while_its_client_is_away_frees_its_memory(
    context: ServerContext,
) -> None:
    """Its connection did not, as the step waited for other clients."""
    context.registry.find(greet(ANN), "")
    key = TaskKey(ANN, "train", 0, 0)
    for end in (Delivery(key=key, version=1, is_last=True),
                Delivery(key=key, version=1, error=StepEnded(0))):  # fmt: skip
        budget = context.budget = Budget(100)
        asyncio.run(ask(budget, 60))
        pass_on(context, Delivery(key=key, version=1))  # a part of it
        assert budget.used == 60
        pass_on(context, end)
        assert budget.used == 0


def test_micro_batches_keep_their_memory_until_their_step_ends(context: ServerContext) -> None:
    context.registry.find(greet(ANN), "")
    keys = [TaskKey(ANN, "accumulate", 0, 0), TaskKey(ANN, "update", 0, 1)]
    for end in (Delivery(key=keys[1], version=1, is_last=True),
                Delivery(key=keys[0], version=1, error=StepEnded(0))):  # fmt: skip
        budget = context.budget = Budget(100)
        for key in keys:
            asyncio.run(ask(budget, 30, key.phase))
        pass_on(context, Delivery(key=keys[0], version=1, is_last=True))
        assert budget.used == 60
        pass_on(context, end)
        assert budget.used == 0


async def ask(budget: Budget, size: int, phase: str = "train") -> None:
    """Reserve memory for the step."""
    await budget.ask((ANN, phase), ANN, size)


def test_a_round_that_cannot_be_closed_now_is_tried_again(
    context: ServerContext, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(deliveries, "TICK_SECONDS", 0.0)
    failures = [MemoryError("no memory for the average")]

    def tick(now: float) -> Iterator[Delivery]:
        if failures:
            raise failures.pop()
        yield DELIVERY

    async def check() -> None:
        context.stop = asyncio.Event()
        monkeypatch.setattr(context.registry.policy, "tick", tick)
        connection = context.holders[ANN] = Connection()
        ticking = asyncio.create_task(keep_ticking(context))
        while not (connection.given or ticking.done()):
            await asyncio.sleep(0)
        context.stop.set()
        await ticking

    asyncio.run(check())
    assert "no memory for the average" in caplog.text


def test_what_is_due_is_passed_on_until_the_server_stops(
    context: ServerContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deliveries, "TICK_SECONDS", 0.0)
    times: list[float] = []

    def tick(now: float) -> Iterator[Delivery]:
        times.append(now)
        yield DELIVERY

    async def check() -> None:
        context.stop = asyncio.Event()
        monkeypatch.setattr(context.registry.policy, "tick", tick)
        connection = context.holders[ANN] = Connection()
        ticking = asyncio.create_task(keep_ticking(context))
        while len(connection.given) < 2:
            await asyncio.sleep(0)
        context.stop.set()
        await ticking
        assert times == sorted(times)

    asyncio.run(check())
