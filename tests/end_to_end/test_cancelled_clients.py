"""A call of a client on an event loop that ends early leaves nothing behind, whatever it did."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from typing import Any

import pytest

from splitonnx import AsyncClient
from splitonnx.codecs import Chunk
from splitonnx.errors import ConnectionLost, LocalProtocolError
from splitonnx.messages import Tensors, decode_message
from splitonnx.runtime.channels.asynchronous.websockets import AsyncWebSocketTransport, connect
from splitonnx.runtime.engine.engines import Engine
from tests.end_to_end.test_accumulated_steps import cut_zoo
from tests.end_to_end.test_async_clients import DIVISIONS, ROWS, assert_same, serving
from tests.support.echoes import PATIENCE
from tests.support.zoo import ZOO


class Held:
    """A way to a server whose replies to tasks are held back; ``sent`` names what was sent."""

    def __init__(self, url: str) -> None:
        self.has_sent = asyncio.Event()
        self.sent: list[str] = []
        self._url = url

    async def dial(self) -> HeldTransport:
        transport = await HeldTransport.open(self._url)
        transport.held = self
        return transport


class HeldTransport(AsyncWebSocketTransport):
    held: Held

    async def send(self, chunks: Sequence[Chunk]) -> None:
        await super().send(chunks)
        message, _ = decode_message(b"".join(chunks))
        self.held.sent.append(type(message).__name__)
        if isinstance(message, Tensors):
            self.held.has_sent.set()

    async def receive(self) -> Chunk | bytearray:
        if self.held.has_sent.is_set():
            await asyncio.Event().wait()
        return await super().receive()


def list_threads() -> list[threading.Thread]:
    return [one for one in threading.enumerate() if one.name.startswith("splitonnx-work")]


@pytest.mark.parametrize("division", DIVISIONS)
def test_a_step_that_is_cancelled_while_it_waits_leaves_the_state_and_ends_the_session(
    division: str,
) -> None:
    bundle = cut_zoo("dropout", "U-shaped")
    batch = ZOO["dropout"].data(ROWS)

    async def cancel(url: str) -> None:
        held = Held(url)
        async with AsyncClient(bundle.client, held.dial, threads=1) as client:
            before = await client.state()
            step = asyncio.create_task(client.step(batch, **DIVISIONS[division]))
            await held.has_sent.wait()
            step.cancel()
            with pytest.raises(asyncio.CancelledError):
                await step
            assert held.sent[-1] == "Bye"
            assert not list_threads()
            assert client.steps == 0
            assert_same(await client.state(), before)
            with pytest.raises(LocalProtocolError, match="client is closed"):
                await client.step(batch)

    with serving(bundle) as server:
        asyncio.run(cancel(server.url))


def test_a_timeout_ends_a_step_that_waits() -> None:
    bundle = cut_zoo("dropout", "vanilla")

    async def wait(url: str) -> None:
        held = Held(url)
        async with AsyncClient(bundle.client, held.dial, threads=1) as client:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.2):
                    await client.step(ZOO["dropout"].data(ROWS))
            assert held.sent[-1] == "Bye"

    with serving(bundle) as server:
        asyncio.run(wait(server.url))


def test_a_step_that_is_cancelled_while_a_stage_runs_stops_it_and_waits_for_its_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    bundle = cut_zoo("dropout", "vanilla")
    runs, stopped = threading.Event(), threading.Event()
    ended: list[str] = []
    run, stop = Engine.run, Engine.stop

    def run_until_stopped(self: Engine, stage: Any, feeds: Any) -> Any:
        runs.set()
        assert stopped.wait(PATIENCE)
        try:
            return run(self, stage, feeds)
        finally:
            ended.append(stage.name)

    def stop_and_tell(self: Engine) -> None:
        stop(self)
        stopped.set()

    async def cancel(url: str) -> None:
        async with AsyncClient(bundle.client, url, threads=1) as client:
            before = await client.state()
            monkeypatch.setattr(Engine, "run", run_until_stopped)
            monkeypatch.setattr(Engine, "stop", stop_and_tell)
            step = asyncio.create_task(client.step(ZOO["dropout"].data(ROWS)))
            assert await asyncio.to_thread(runs.wait, PATIENCE)  # the loop is free meanwhile
            step.cancel()
            with pytest.raises(asyncio.CancelledError):
                await step
            assert len(ended) == 1
            assert not list_threads()
            assert_same(await client.state(), before)

    with serving(bundle) as server:
        asyncio.run(cancel(server.url))
        monkeypatch.undo()


def test_a_step_that_is_cancelled_while_the_server_is_away_ends_at_once() -> None:
    bundle = cut_zoo("dropout", "vanilla")
    attempts: asyncio.Queue[int] = asyncio.Queue()

    async def cancel(url: str) -> None:
        async def dial() -> AsyncWebSocketTransport:
            attempts.put_nowait(1)
            if attempts.qsize() > 1:
                raise ConnectionLost(url, "it is away")
            transport = await connect(url)
            opened.append(transport)
            return transport

        opened: list[AsyncWebSocketTransport] = []
        async with AsyncClient(bundle.client, dial, threads=1) as client:
            opened[0].abort()
            step = asyncio.create_task(client.step(ZOO["dropout"].data(ROWS)))
            while attempts.qsize() < 3:
                await asyncio.sleep(0)
            step.cancel()
            with pytest.raises(asyncio.CancelledError):
                await step
            assert client.steps == 0

    with serving(bundle) as server:
        asyncio.run(cancel(server.url))


def test_closing_the_client_ends_the_call_that_runs_and_those_that_wait_for_it() -> None:
    bundle = cut_zoo("dropout", "vanilla")
    batch = ZOO["dropout"].data(ROWS)

    async def close(url: str) -> None:
        held = Held(url)
        client = await AsyncClient(bundle.client, held.dial, threads=1).open()
        steps = [asyncio.create_task(client.step(batch)) for _ in range(2)]
        await held.has_sent.wait()
        await client.close()
        first, second = await asyncio.gather(*steps, return_exceptions=True)
        assert isinstance(first, LocalProtocolError)
        assert "closed during this call" in str(first)
        assert isinstance(second, LocalProtocolError)
        assert "the client is closed" in str(second)
        assert held.sent[-1] == "Bye"
        assert held.sent.count("Tensors") == 1

    with serving(bundle) as server:
        asyncio.run(close(server.url))
