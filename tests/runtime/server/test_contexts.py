"""What a server's connections share: open tasks of silent clients make room for those who wait."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator

import pytest

from splitonnx.bundles import Bundle
from splitonnx.partitioner.partitions import cut
from splitonnx.runtime.scheduling.budgets import UPLOAD_SECONDS, Budget
from splitonnx.runtime.server.contexts import ServerContext
from splitonnx.runtime.server.policies.tasks import Delivery
from splitonnx.runtime.wire.close_codes import RESTART
from tests.support.callers import ACTIVATION, SESSION, Caller, make_task
from tests.support.server_contexts import open_context
from tests.support.zoo import ZOO

TASK, OTHER = (SESSION, "train"), ("2" * 32, "train")


class Holder:
    """A session's newest connection."""

    def __init__(self) -> None:
        self.is_sending = False
        self.dismissed: list[int] = []

    def dismiss(self, code: int, reason: str) -> None:
        self.dismissed.append(code)

    def deliver(self, delivery: Delivery) -> None:
        raise AssertionError("nothing is due")


class Scene:
    """A silent client's open step, which has all the memory, and somebody who waits for some."""

    def __init__(self, bundle: Bundle, context: ServerContext) -> None:
        caller = Caller(bundle, context.registry, owner="ann")
        caller.say(make_task(), ACTIVATION)
        assert caller.dispatcher.session is not None
        self.session = caller.dispatcher.session
        self.context, self._now = context, 0.0
        self.budget = context.budget = Budget(100, clock=lambda: self._now)
        self.holder = context.holders[SESSION] = Holder()
        self.lock = context.locks[SESSION] = asyncio.Lock()
        self.budget.ask(TASK, "ann", 100)
        self.budget.pause(TASK)
        self._now = UPLOAD_SECONDS / 2

    def wait_for_memory(self) -> asyncio.Future[None]:
        return self.budget.ask(OTHER, "bob", 50)


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return cut(ZOO["chain"].build(), at="act1", tail_at="act3")


Play = Callable[[Callable[[Scene], Coroutine[None, None, None]]], None]


@pytest.fixture
def play(bundle: Bundle) -> Iterator[Play]:
    with open_context(bundle) as context:

        def run(test: Callable[[Scene], Coroutine[None, None, None]]) -> None:
            async def begin() -> None:
                await test(Scene(bundle, context))

            asyncio.run(begin())

        yield run


def test_a_silent_client_s_open_step_is_given_up_and_the_client_sent_away(play: Play) -> None:
    async def test(scene: Scene) -> None:
        waiting = scene.wait_for_memory()
        scene.context.give_up_idle()
        assert waiting.done()
        assert not scene.session.open_phases
        assert scene.session.ledger.step == 0
        assert scene.holder.dismissed == [RESTART]

    play(test)


def test_without_anybody_who_waits_nothing_is_given_up(play: Play) -> None:
    async def test(scene: Scene) -> None:
        scene.context.give_up_idle()
        assert scene.session.open_phases == {"train"}
        assert scene.holder.dismissed == []

    play(test)


def test_a_client_whose_message_is_on_its_way_is_left_alone(play: Play) -> None:
    async def test(scene: Scene) -> None:
        scene.holder.is_sending = True
        waiting = scene.wait_for_memory()
        scene.context.give_up_idle()
        assert not waiting.done()
        assert scene.session.open_phases == {"train"}

    play(test)


def test_a_session_that_is_being_worked_on_is_left_alone_unless_it_only_waits(play: Play) -> None:
    async def test(scene: Scene) -> None:
        waiting = scene.wait_for_memory()
        async with scene.lock:
            scene.context.give_up_idle()
            assert not waiting.done()
            scene.context.waiting.add(SESSION)
            scene.context.give_up_idle()
        assert waiting.done()
        assert not scene.session.open_phases

    play(test)


def test_memory_of_a_session_that_is_gone_is_given_back(play: Play) -> None:
    async def test(scene: Scene) -> None:
        scene.context.registry.end(scene.session)
        waiting = scene.wait_for_memory()
        scene.context.give_up_idle()
        assert waiting.done()
        assert scene.holder.dismissed == []

    play(test)


def test_without_a_connection_the_step_is_given_up_all_the_same(play: Play) -> None:
    async def test(scene: Scene) -> None:
        del scene.context.holders[SESSION]
        waiting = scene.wait_for_memory()
        scene.context.give_up_idle()
        assert waiting.done()
        assert not scene.session.open_phases

    play(test)
