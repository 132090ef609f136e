"""The server's side of a connection that breaks at the worst moment."""

from __future__ import annotations

import asyncio
import gc
import weakref
from collections.abc import Iterator, Sequence
from typing import cast

import msgspec
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from splitonnx.bundles import Bundle
from splitonnx.codecs import Chunk
from splitonnx.errors import ConnectionLost
from splitonnx.messages import Bye, Hello, Message, Tensors
from splitonnx.names import CLIENT
from splitonnx.partitioner.partitions import cut
from splitonnx.runtime.edge.tokens import DEFAULT_ROLES
from splitonnx.runtime.edge.websockets import Peer
from splitonnx.runtime.engine.estimates import Estimates
from splitonnx.runtime.scheduling.budgets import Budget
from splitonnx.runtime.server.contexts import ServerContext
from splitonnx.runtime.server.handlers import ConnectionHandler
from splitonnx.runtime.server.metrics import Metrics
from splitonnx.runtime.wire.protocols import Protocol, list_wires
from tests.support.echoes import PATIENCE
from tests.support.server_contexts import open_context
from tests.support.zoo import ZOO

SESSION = "0123456789abcdef" * 2


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    return cut(ZOO["chain"].build(), at="act1", tail_at="act3")


@pytest.fixture
def context(bundle: Bundle) -> Iterator[ServerContext]:
    with open_context(bundle) as context:
        yield context


class LimitedConnection:
    """A client that begins a step, hears so many replies, and is gone."""

    name = "127.0.0.1"
    owner = ""
    roles = DEFAULT_ROLES

    def __init__(self, bundle: Bundle, *, hears: int) -> None:
        manifest = bundle.client.manifest
        self.left = hears
        self.said = self.answered = 0
        hello = Hello(
            digest=manifest.digest,
            session=SESSION,
            generation=1,
            step=0,
            wires=list_wires(manifest),
        )
        self._says: list[tuple[Message, dict[str, np.ndarray] | None]] = [(hello, None), *STEP]
        self._protocol = Protocol(manifest, CLIENT)

    async def receive(self) -> bytes:
        if not self._says:
            raise ConnectionLost(self.name, "it closed without a word")
        message, wires = self._says.pop(0)
        content = b"".join(self._protocol.send(message, wires))
        self.said += len(content)
        return content

    async def wait_closed(self) -> None:
        await asyncio.Event().wait()

    async def send(self, chunks: Sequence[Chunk]) -> None:
        self.answered += sum(map(len, chunks))
        if not self.left:
            raise ConnectionLost(self.name, "it closed without a word")
        self.left -= 1
        self._protocol.receive(b"".join(chunks))


def make_task(turn: int) -> Tensors:
    return Tensors(
        session=SESSION,
        phase="train",
        step=0,
        micro_batch=0,
        turn=turn,
        seed=0,
        learning_rate=1e-3,
    )


STEP = (
    (make_task(0), {"act1@server": np.ones((2, 7), np.float32)}),
    (make_task(1), {"act3@client_grad": np.ones((2, 6), np.float32)}),
)


def count_steps(metrics: Metrics) -> float:
    (steps,) = (
        family
        for family in text_string_to_metric_families(metrics.render()[1].decode())
        if family.name == "splitonnx_steps"
    )
    return sum(sample.value for sample in steps.samples if sample.name.endswith("_total"))


@pytest.mark.parametrize("hears", [3, 2], ids=["every reply", "all but the last reply"])
def test_a_step_that_was_made_is_counted_whether_or_not_the_client_heard_of_it(
    bundle: Bundle, context: ServerContext, hears: int
) -> None:
    peer = LimitedConnection(bundle, hears=hears)
    asyncio.run(ConnectionHandler(context, cast("Peer", peer)).run())
    assert peer.left == 0
    assert count_steps(context.metrics) == 1
    (session,) = context.registry.sessions
    assert (session.status.bytes_up, session.status.bytes_down) == (peer.said, peer.answered)


def test_nothing_of_a_connection_is_kept_once_it_is_gone(
    bundle: Bundle, context: ServerContext
) -> None:
    handler = ConnectionHandler(context, cast("Peer", LimitedConnection(bundle, hears=3)))
    gone = weakref.ref(handler)
    asyncio.run(handler.run())
    del handler
    for turns in (context.compute, context.storage):
        turns.close()  # a thread may just be leaving the function that it ran
    gc.collect()
    assert gone() is None


class Leaving(LimitedConnection):
    """A client that is welcomed and says goodbye, just as the server begins to stop."""

    is_sending = True

    def __init__(self, bundle: Bundle, stop: asyncio.Event) -> None:
        super().__init__(bundle, hears=1)
        self._says[1:] = [(Bye(), None)]
        self._stop = stop

    async def receive(self) -> bytes:
        content = await super().receive()
        if not self._says:
            self._stop.set()
            for _ in range(9):  # it takes a while to hand a message on
                await asyncio.sleep(0)
        return content


def test_a_goodbye_that_has_arrived_is_heard_though_the_server_stops(
    bundle: Bundle, context: ServerContext
) -> None:
    peer = Leaving(bundle, context.stop)
    asyncio.run(ConnectionHandler(context, cast("Peer", peer)).run())
    assert (peer.left, context.registry.sessions) == (0, ())


class Deaf(LimitedConnection):
    """A client that takes the last reply to its step only once it ``listens``."""

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(bundle, hears=3)
        self.is_dismissed = False
        self.is_told = asyncio.Event()
        self.listens = asyncio.Event()

    async def send(self, chunks: Sequence[Chunk]) -> None:
        if self.left == 1:
            self.is_told.set()
            await self.listens.wait()
        if self.is_dismissed:
            raise ConnectionLost(self.name, "it was ended here")
        await super().send(chunks)

    def dismiss(self, code: int, reason: str) -> None:
        self.is_dismissed = True
        self.listens.set()


def test_a_step_gives_its_memory_back_though_nobody_reads_its_reply(
    bundle: Bundle, context: ServerContext
) -> None:
    assert bundle.server is not None
    estimates = Estimates(bundle.server.manifest, bundle.server.graphs)
    needed = estimates.measure("train", {"N": 2})

    async def train() -> None:
        context.estimates, context.budget = estimates, Budget(needed)
        peer = Deaf(bundle)
        serving = asyncio.create_task(ConnectionHandler(context, cast("Peer", peer)).run())
        await peer.is_told.wait()
        other = context.budget.ask(("0" * 32, "train"), "ana", needed)
        await asyncio.wait_for(other, PATIENCE)
        peer.listens.set()
        await serving

    asyncio.run(train())


def test_a_server_that_halts_does_not_wait_for_a_reply_to_be_read(
    bundle: Bundle, context: ServerContext
) -> None:
    async def train() -> None:
        peer = Deaf(bundle)
        serving = asyncio.create_task(ConnectionHandler(context, cast("Peer", peer)).run())
        await peer.is_told.wait()
        context.stop.set()
        context.halt.set()
        await asyncio.wait_for(serving, PATIENCE)
        assert peer.is_dismissed

    asyncio.run(train())
    assert count_steps(context.metrics) == 1


class Pipelining(LimitedConnection):
    """A client that sends micro-batches, and reads replies only as it is ``allowed``.

    ``asked`` is how often the server has asked for the next message.
    """

    def __init__(self, bundle: Bundle, *, in_flight: int, number: int) -> None:
        super().__init__(bundle, hears=number + 1)
        hello = self._says[0][0]
        self._says = [
            (msgspec.structs.replace(cast("Hello", hello), in_flight=in_flight), None),
            *[(make_micro_batch(n), make_wires()) for n in range(number)],
        ]
        self.allowed = asyncio.Semaphore(1)  # the welcome
        self.asked = 0
        self.ahead: list[int] = []

    async def receive(self) -> bytes:
        self.asked += 1
        return await super().receive()

    async def send(self, chunks: Sequence[Chunk]) -> None:
        await self.allowed.acquire()
        await super().send(chunks)

    def read_ahead(self, size: int) -> None:
        self.ahead.append(size)


def make_micro_batch(number: int) -> Tensors:
    return msgspec.structs.replace(make_task(0), phase="accumulate", micro_batch=number)


def make_wires() -> dict[str, np.ndarray]:
    return {
        "act1@server": np.ones((2, 7), np.float32),
        "labels@server": np.zeros(2, np.int64),
        "splitonnx.weight": np.array(0.5, np.float32),
    }


@pytest.mark.parametrize("in_flight", [1, 2, 3])
def test_a_client_may_leave_as_many_tasks_unread_as_it_may_have_open(
    in_flight: int,
) -> None:
    bundle = cut(ZOO["chain"].build(), at="act1")
    number = 5

    async def train(context: ServerContext) -> None:
        peer = Pipelining(bundle, in_flight=in_flight, number=number)
        serving = asyncio.create_task(ConnectionHandler(context, cast("Peer", peer)).run())
        first = 1 if in_flight == 1 else in_flight + 1
        for done in range(first, number + 1):
            while sum(session.tasks_done for session in context.registry.sessions) < done:
                assert not serving.done(), serving.result()
                await asyncio.sleep(0)
            for _ in range(50):  # it would ask for the next message at once
                await asyncio.sleep(0)
            assert peer.asked == 1 + done
            peer.allowed.release()
        for _ in range(number):
            peer.allowed.release()
        await asyncio.wait_for(serving, PATIENCE)
        assert peer.left == 0
        assert count_steps(context.metrics) == number
        assert len(peer.ahead) == (number if in_flight > 1 else 0)

    with open_context(bundle) as context:
        asyncio.run(train(context))
