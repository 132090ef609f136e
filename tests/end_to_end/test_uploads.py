"""Whose next message is on its way is not idle, however slowly it comes."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from typing import cast

import pytest
from websockets.asyncio.client import connect

from splitonnx.bundles import Bundle
from splitonnx.partitioner.partitions import cut
from splitonnx.runtime.edge.websockets import Peer, serve
from splitonnx.runtime.scheduling import budgets
from splitonnx.runtime.scheduling.budgets import Budget
from splitonnx.runtime.server.contexts import ServerContext
from splitonnx.runtime.server.handlers import ConnectionHandler
from splitonnx.runtime.server.policies.tasks import Delivery
from tests.runtime.server.test_handlers import LimitedConnection
from tests.support.echoes import PATIENCE
from tests.support.server_contexts import open_context
from tests.support.zoo import ZOO

TASK = ("a" * 32, "train")


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return cut(ZOO["chain"].build(), at="act1", tail_at="act3")


@pytest.fixture
def context(bundle: Bundle) -> Iterator[ServerContext]:
    with open_context(bundle) as context:
        yield context


class Sender:
    """The connection of a client that sends a message."""

    def __init__(self) -> None:
        self.is_sending = True
        self.is_dismissed = False

    def dismiss(self, code: int, reason: str) -> None:
        self.is_dismissed = True

    def deliver(self, delivery: Delivery) -> None:
        raise AssertionError("nothing is due")


def test_the_memory_of_a_step_is_not_taken_from_who_sends_its_next_message(
    context: ServerContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On earlier versions it is, after 10 s, in every step, while others wait."""
    monkeypatch.setattr(budgets, "IDLE_SECONDS", 0.0)
    sender = Sender()

    async def check() -> None:
        budget = context.budget = Budget(100)
        context.holders[TASK[0]] = sender
        budget.ask(TASK, "ana", 90)
        budget.pause(TASK)
        waiting = budget.ask(("b" * 32, "train"), "eve", 50)
        context.give_up_idle()
        assert not waiting.done()
        sender.is_sending = False
        context.give_up_idle()
        assert waiting.done()

    asyncio.run(check())


def test_a_message_that_waits_for_its_turn_to_be_read_counts_as_sent_still(
    bundle: Bundle, context: ServerContext
) -> None:
    class Silent(LimitedConnection):
        is_sending = False

    async def check() -> None:
        handler = ConnectionHandler(context, cast("Peer", Silent(bundle, hears=3)))
        free = threading.Event()
        working = context.compute.run("somebody else", free.wait)
        serving = asyncio.create_task(handler.run())
        while not handler.is_sending or handler._dispatcher is None:
            await asyncio.sleep(0)
        while handler._dispatcher.session is None:  # its greeting, on another queue
            await asyncio.sleep(0)
        while not handler.is_sending:
            await asyncio.sleep(0)
        free.set()
        await asyncio.wait_for(serving, PATIENCE)
        await working
        assert not handler.is_sending

    asyncio.run(check())


def test_a_peer_is_sending_from_a_messages_first_byte_until_it_is_received() -> None:
    async def check() -> None:
        half, seen = asyncio.Event(), asyncio.Event()

        async def handle(peer: Peer) -> None:
            assert not peer.is_sending
            receiving = asyncio.ensure_future(peer.receive())
            while not peer.is_sending:
                await asyncio.sleep(0)
            half.set()
            assert await receiving == b"onetwo"
            assert not peer.is_sending
            seen.set()

        async def send() -> AsyncIterator[bytes]:
            yield b"one"
            await half.wait()
            yield b"two"

        async with (
            serve(handle, "127.0.0.1", 0) as port,
            connect(f"ws://127.0.0.1:{port}", compression=None) as client,
        ):
            await client.send(send())
            await seen.wait()

    asyncio.run(asyncio.wait_for(check(), PATIENCE))
