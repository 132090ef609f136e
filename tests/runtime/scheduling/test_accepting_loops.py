"""uvloop's event loop with servers that accept by their listening sockets."""

from __future__ import annotations

import asyncio
import errno
import queue
import socket
from collections.abc import Awaitable, Callable, Iterator
from contextlib import ExitStack, closing
from typing import Any, cast

import pytest

from tests.support.echoes import PATIENCE, dial

pytest.importorskip("uvloop", reason="it has no wheel for this platform")

from splitonnx.runtime.scheduling.accepting_loops import (
    RETRY_SECONDS,
    AcceptingLoop,
    AcceptingServer,
)

MANY = 64 << 20
"""More bytes than the operating system takes at a time."""


class Listening(socket.socket):
    """A listening socket that raises the given errors first, and counts the calls of accept."""

    def __init__(self, *faults: OSError) -> None:
        super().__init__()
        self.faults = [*faults]
        self.calls = 0
        self.bind(("127.0.0.1", 0))
        self.listen()
        self.setblocking(False)

    @property
    def port(self) -> int:
        port: int = self.getsockname()[1]
        return port

    def accept(self) -> tuple[socket.socket, Any]:
        self.calls += 1
        if self.faults:
            raise self.faults.pop(0)
        return super().accept()


class Arrival(asyncio.Protocol):
    """A connection that says hello, and is noted."""

    def __init__(self, made: queue.Queue[asyncio.Transport]) -> None:
        self._made = made

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        made = cast("asyncio.Transport", transport)
        made.write(b"hello")
        self._made.put(made)


Story = Callable[[AcceptingLoop, AcceptingServer, "queue.Queue[asyncio.Transport]"],
                 Awaitable[None]]  # fmt: skip


def tell(listener: Listening, story: Story) -> list[dict[str, Any]]:
    """Serve on a listening socket, and return what the event loop's exception handler got."""
    told: list[dict[str, Any]] = []

    async def run() -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, AcceptingLoop)
        loop.set_exception_handler(lambda _, context: told.append(context))
        made: queue.Queue[asyncio.Transport] = queue.Queue()
        server = await loop.create_server(lambda: Arrival(made), sock=listener)
        await asyncio.wait_for(story(loop, server, made), PATIENCE)
        server.close()
        await server.wait_closed()

    with closing(listener), asyncio.Runner(loop_factory=AcceptingLoop) as runner:
        runner.run(run())
    return told


def hear(connection: socket.socket) -> bytes:
    return connection.recv(5)


def test_connections_are_accepted_by_the_socket_itself() -> None:
    listener = Listening()

    async def story(*_: object) -> None:
        with ExitStack() as crowd:
            waiting = [crowd.enter_context(dial(listener.port)) for _ in range(3)]
            for connection in waiting:
                assert await asyncio.to_thread(hear, connection) == b"hello"

    assert tell(listener, story) == []
    assert listener.calls >= 4  # the last finds that there is none


def test_who_is_not_accepted_yet_is_accepted_next_time() -> None:
    """The listener may turn to other work while connections wait."""
    listener = Listening(BlockingIOError(), BlockingIOError())

    async def story(*_: object) -> None:
        with dial(listener.port) as connection:
            assert await asyncio.to_thread(hear, connection) == b"hello"

    assert tell(listener, story) == []


class Recorder:
    """An event loop that only notes what it is asked for."""

    def __init__(self) -> None:
        self.reader: Callable[[], None] | None = None
        self.later: list[tuple[float, Callable[[], None]]] = []
        self.told: list[dict[str, Any]] = []

    def add_reader(self, _: socket.socket, function: Callable[[], None]) -> None:
        self.reader = function

    def remove_reader(self, _: socket.socket) -> None:
        self.reader = None

    def call_later(self, seconds: float, function: Callable[[], None]) -> None:
        self.later.append((seconds, function))

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        self.told.append(context)


async def refuse_all(connection: socket.socket) -> None:
    connection.close()


@pytest.fixture
def failing() -> Iterator[tuple[Recorder, AcceptingServer, OSError]]:
    """A server that has just failed to accept a connection."""
    fault = OSError(errno.EMFILE, "Too many open files")
    loop = Recorder()
    with Listening(fault) as listener:
        server = AcceptingServer(cast("asyncio.AbstractEventLoop", loop), listener, refuse_all)
        asyncio.run(server.start_serving())
        assert loop.reader is not None
        loop.reader()
        yield loop, server, fault


Failing = tuple[Recorder, AcceptingServer, OSError]


def test_after_an_error_none_is_accepted_for_a_while_and_then_again(failing: Failing) -> None:
    loop, _, fault = failing
    assert loop.told[0]["exception"] is fault
    assert loop.reader is None
    ((seconds, resume),) = loop.later
    assert seconds == RETRY_SECONDS
    resume()
    assert loop.reader is not None
    loop.reader()  # nobody is there, which is no fault
    assert len(loop.told) == 1


def test_a_server_that_was_closed_meanwhile_does_not_resume(failing: Failing) -> None:
    loop, server, _ = failing
    server.close()
    assert not server.is_serving()
    assert server.sockets == ()
    loop.later[0][1]()
    assert loop.reader is None


def test_closing_stops_new_connections_and_leaves_those_that_are_open() -> None:
    listener = Listening()
    port = listener.port

    async def story(
        loop: AcceptingLoop, server: AcceptingServer, made: queue.Queue[asyncio.Transport]
    ) -> None:
        assert server.is_serving()
        assert server.sockets == (listener,)
        assert server.get_loop() is loop
        with dial(port) as connection:
            assert await asyncio.to_thread(hear, connection) == b"hello"
            server.close()
            server.close()
            with pytest.raises(ConnectionRefusedError):
                socket.create_connection(("127.0.0.1", port)).close()
            made.get_nowait().write(b"still")
            assert await asyncio.to_thread(hear, connection) == b"still"

    assert tell(listener, story) == []


class Both(asyncio.Protocol, asyncio.BufferedProtocol):
    """A connection that chooses its memory, as the server's do, and notes what it is told."""

    def __init__(self, told: queue.Queue[str]) -> None:
        self._told = told
        self._memory = bytearray(3)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)
        self._transport.set_write_buffer_limits(1 << 20)

    def data_received(self, data: bytes) -> None:
        raise AssertionError("it has its own memory")

    def get_buffer(self, sizehint: int) -> memoryview:
        return memoryview(self._memory)

    def buffer_updated(self, nbytes: int) -> None:
        self._told.put(self._memory[:nbytes].decode())
        if self._memory[:nbytes] == b"all":
            self._transport.write(bytes(MANY))

    def pause_writing(self) -> None:
        self._told.put("pause")

    def resume_writing(self) -> None:
        self._told.put("resume")

    def eof_received(self) -> bool:
        self._told.put("end")
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self._told.put("lost")


def test_a_protocol_that_chooses_its_memory_is_asked_for_it_and_told_all_else() -> None:
    told: queue.Queue[str] = queue.Queue()

    def talk(port: int) -> list[str]:
        with dial(port) as connection:
            connection.sendall(b"all")
            assert told.get(timeout=PATIENCE) == "all"
            assert told.get(timeout=PATIENCE) == "pause"
            received = 0
            while received < MANY:
                received += len(connection.recv(1 << 20))
            assert told.get(timeout=PATIENCE) == "resume"
        return [told.get(timeout=PATIENCE) for _ in range(2)]

    async def run() -> None:
        loop = asyncio.get_running_loop()
        with Listening() as listener:
            server = await loop.create_server(lambda: Both(told), sock=listener)
            assert await asyncio.to_thread(talk, listener.port) == ["end", "lost"]
            server.close()

    with asyncio.Runner(loop_factory=AcceptingLoop) as runner:
        runner.run(run())


def test_a_socket_that_cannot_become_a_connection_is_closed() -> None:
    async def run() -> None:
        loop = asyncio.get_running_loop()

        async def fail(_: socket.socket) -> None:
            raise ConnectionResetError

        with Listening() as listener, dial(listener.port) as connection:
            server = AcceptingServer(loop, listener, fail)
            await server.start_serving()
            assert await asyncio.to_thread(connection.recv, 1) == b""
            server.close()

    with asyncio.Runner(loop_factory=AcceptingLoop) as runner:
        runner.run(run())
