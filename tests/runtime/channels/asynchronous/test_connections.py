"""What a client on a loop holds of what its server says unasked."""

from __future__ import annotations

import asyncio
import socket
import threading
from pathlib import Path

import pytest

from splitonnx.errors import ConnectionLost, MessageTooLarge
from splitonnx.runtime.channels.asynchronous.websockets import AsyncWebSocketTransport, connect
from splitonnx.runtime.channels.bounded_connections import MAX_FRAGMENTS, READ_AHEAD
from splitonnx.runtime.channels.credentials import Credentials
from splitonnx.runtime.wire.fragments import FRAGMENT
from splitonnx.runtime.wire.tls import make_client_tls, make_server_tls
from tests.support.certificates import Files
from tests.support.echoes import PATIENCE, Echo
from tests.support.frozen_readers import LARGE, SLOW, freezing, read_slowly, send_pings
from tests.support.pretenders import accept, pretending

CONNECTIONS = "splitonnx.runtime.channels.asynchronous.connections"
SIZE = 8 << 20


@pytest.mark.parametrize("are_whole", [True, False], ids=["whole messages", "one message"])
def test_what_nobody_waits_for_is_not_read_without_end(are_whole: bool) -> None:
    stalled = threading.Event()

    def flood(connection: socket.socket) -> None:
        accept(connection)
        connection.settimeout(0.5)
        first, later = (0x82, 0x82) if are_whole else (0x02, 0x00)
        for number in range(10):
            head = bytes([later if number else first, 0x7F]) + SIZE.to_bytes(8, "big")
            try:
                connection.sendall(head + bytes(SIZE))
            except TimeoutError:
                stalled.set()
                return

    async def wait(url: str) -> None:
        transport = await connect(url)
        assert await asyncio.to_thread(stalled.wait, PATIENCE)
        held = transport._connection
        if are_whole:
            assert held.waiting_bytes <= READ_AHEAD + SIZE
            assert len(await transport.receive()) == SIZE  # what was kept can still be read
        else:
            assert held.is_underway
            assert held.waiting_bytes == 0
        await transport.close()

    with pretending(flood) as url:
        asyncio.run(wait(url))


def test_a_message_larger_than_what_is_read_ahead_arrives_while_it_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(f"{CONNECTIONS}.READ_AHEAD", 10_000)

    async def talk() -> None:
        transport = await connect(echo.url)
        for _ in range(3):
            await transport.send([bytes(2 * FRAGMENT + 5)])
            assert await transport.receive() == bytes(2 * FRAGMENT + 5)
        for _ in range(8):  # the others wait while the first is read
            await transport.send([bytes(9_000)])
        assert [len(await transport.receive()) for _ in range(8)] == [9_000] * 8
        assert transport._connection.waiting_bytes == 0
        await transport.send([bytes(9_000)])
        await transport.send([bytes(9_000)])
        await transport.close()  # in the middle of what waits
        with pytest.raises(ConnectionLost):
            await transport.send([b"late"])

    with Echo() as echo:
        asyncio.run(talk())


def test_a_wait_that_is_cancelled_loses_no_message() -> None:
    async def talk() -> None:
        transport = await connect(echo.url)
        for number in range(20):
            waiting = asyncio.create_task(transport.receive())
            await transport.send([bytes([number])])
            for _ in range(number):  # before it comes, or just as it does
                await asyncio.sleep(0)
            waiting.cancel()
            (found,) = await asyncio.gather(waiting, return_exceptions=True)
            if isinstance(found, asyncio.CancelledError):
                found = await transport.receive()
            assert found == bytes([number])
        await transport.close()

    with Echo() as echo:
        asyncio.run(talk())


@pytest.mark.parametrize("content", [b"", b"x"])
def test_a_message_of_too_many_fragments_is_refused(content: bytes) -> None:
    def crumble(connection: socket.socket) -> None:
        accept(connection)
        crumb = bytes([len(content)]) + content
        connection.sendall(b"\x02" + crumb + (b"\0" + crumb) * MAX_FRAGMENTS)
        while connection.recv(1 << 16):
            continue

    async def wait(url: str) -> None:
        transport = await connect(url)
        with pytest.raises(MessageTooLarge, match="too many fragments"):
            await transport.receive()
        await transport.close()

    with pretending(crumble) as url:
        asyncio.run(wait(url))


def test_a_server_that_stops_reading_is_a_lost_connection() -> None:
    async def talk(url: str) -> None:
        transport = await AsyncWebSocketTransport.open(url, reply_seconds=0.2)
        with pytest.raises(ConnectionLost, match=r"took nothing of a message within 0\.2 s"):
            await asyncio.wait_for(transport.send([LARGE]), PATIENCE)
        await asyncio.wait_for(transport.close(), PATIENCE)

    with freezing() as url:
        asyncio.run(talk(url))


def test_so_it_is_with_tls(tmp_path: Path) -> None:
    files = Files(tmp_path)
    access = Credentials(tls=make_client_tls(authority=files.authority))

    async def talk(url: str) -> None:
        transport = await AsyncWebSocketTransport.open(url, credentials=access)
        transport._connection.limit_sending(0.2)
        with pytest.raises(ConnectionLost, match="took nothing of a message"):
            await asyncio.wait_for(transport.send([LARGE]), PATIENCE)
        await asyncio.wait_for(transport.close(), PATIENCE)

    with freezing(tls=make_server_tls(*files.server)) as url:
        asyncio.run(talk(url))


@pytest.mark.alone
def test_a_server_that_reads_slowly_is_not_lost() -> None:
    async def talk(url: str) -> None:
        transport = await AsyncWebSocketTransport.open(url, reply_seconds=1)
        await transport.send([SLOW])  # which takes twice as long
        assert await transport.receive() == b"ok"
        await transport.close()

    with pretending(read_slowly) as url:
        asyncio.run(talk(url))


def test_closing_does_not_wait_for_a_server_that_stopped_reading() -> None:
    async def talk(url: str) -> None:
        transport = await connect(url)
        sending = asyncio.create_task(transport.send([LARGE]))
        while not transport._connection.paused:
            await asyncio.sleep(0)
        await asyncio.wait_for(transport.close(), PATIENCE)
        with pytest.raises(ConnectionLost):
            await asyncio.wait_for(sending, PATIENCE)

    with freezing() as url:
        asyncio.run(talk(url))


def test_pings_of_a_server_that_reads_no_answers_take_no_memory_without_end() -> None:
    async def wait(url: str) -> None:
        transport = await connect(url)
        with pytest.raises(ConnectionLost, match="does not take the answers to its pings"):
            await asyncio.wait_for(transport.receive(), PATIENCE)
        await transport.close()

    with freezing(send_pings) as url:
        asyncio.run(wait(url))
