"""uvloop's event loop, with servers that accept connections by their listening sockets.

uvloop accepts connections in the operating system's terms, past a listening socket's own
``accept``, which may limit them.  asyncio's event loop calls it, and so do these servers.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Callable, Coroutine
from typing import TYPE_CHECKING, Any

import uvloop

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

BACKLOG = 100
"""Most connections that are accepted before the event loop does other work; asyncio's number."""
RETRY_SECONDS = 1.0
"""Seconds for which no connection is accepted after one could not be; asyncio's number."""


class AcceptingLoop(uvloop.Loop):
    """uvloop's event loop, whose servers call ``accept`` of their listening sockets."""

    async def create_server(  # type: ignore[override]  # only what the websockets library passes
        self,
        protocol_factory: Callable[[], asyncio.BaseProtocol],
        host: None = None,
        port: None = None,
        *,
        sock: socket.socket,
        ssl: ssl.SSLContext | None = None,
        ssl_handshake_timeout: float | None = None,
        ssl_shutdown_timeout: float | None = None,
    ) -> AcceptingServer:
        """Serve the connections that come to ``sock``, a listening socket that does not block."""

        def make_protocol() -> asyncio.BaseProtocol:
            protocol = protocol_factory()
            if isinstance(protocol, asyncio.BufferedProtocol):
                return BufferedOnly(protocol)
            return protocol

        async def serve(connection: socket.socket) -> None:
            await self.connect_accepted_socket(
                make_protocol,
                connection,
                ssl=ssl,
                ssl_handshake_timeout=ssl_handshake_timeout,
                ssl_shutdown_timeout=ssl_shutdown_timeout,
            )

        server = AcceptingServer(self, sock, serve)
        await server.start_serving()
        return server


class BufferedOnly(asyncio.BufferedProtocol):
    """A protocol that hands everything on to another one.

    asyncio lets a protocol that is both a :class:`asyncio.Protocol` and a
    :class:`asyncio.BufferedProtocol` choose the memory that it receives into; uvloop does not.
    """

    def __init__(self, protocol: asyncio.BufferedProtocol) -> None:
        self._protocol = protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Report to the protocol that the connection is open."""
        self._protocol.connection_made(transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """Report to the protocol that the connection has ended."""
        self._protocol.connection_lost(exc)

    def get_buffer(self, sizehint: int) -> ReadableBuffer:
        """Return the memory to receive into."""
        return self._protocol.get_buffer(sizehint)

    def buffer_updated(self, nbytes: int) -> None:
        """Report to the protocol that bytes were received there."""
        self._protocol.buffer_updated(nbytes)

    def eof_received(self) -> bool | None:
        """Report to the protocol that the other side sends no more."""
        return self._protocol.eof_received()

    def pause_writing(self) -> None:
        """Report to the protocol that too many bytes wait to be sent."""
        self._protocol.pause_writing()

    def resume_writing(self) -> None:
        """Report to the protocol that few enough bytes wait to be sent."""
        self._protocol.resume_writing()


class AcceptingServer:
    """A server that calls ``accept`` of its listening socket.

    ``serve`` makes an accepted socket a connection.  The server closes the sockets for which it
    fails.  ``accept`` may raise :class:`BlockingIOError` while connections wait, to let other work
    run first, and any other :class:`OSError` to pause for ``RETRY_SECONDS``.

    It has what the websockets library calls of :class:`asyncio.AbstractServer`.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        listener: socket.socket,
        serve: Callable[[socket.socket], Coroutine[Any, Any, None]],
    ) -> None:
        self._loop = loop
        self._listener = listener
        self._serve = serve
        self._is_serving = False
        self._openings: set[asyncio.Task[None]] = set()

    @property
    def sockets(self) -> tuple[socket.socket, ...]:
        """Return the listening socket, until the server is closed."""
        return (self._listener,) if self._is_serving else ()

    def get_loop(self) -> asyncio.AbstractEventLoop:
        """Return the event loop that the server runs on."""
        return self._loop

    def is_serving(self) -> bool:
        """Return whether the server accepts connections."""
        return self._is_serving

    async def start_serving(self) -> None:
        """Accept connections from now on."""
        self._is_serving = True
        self._resume()

    def close(self) -> None:
        """Stop accepting connections and close the listening socket; connections stay open."""
        if self._is_serving:
            self._is_serving = False
            self._loop.remove_reader(self._listener)
            self._listener.close()

    async def wait_closed(self) -> None:
        """Return at once, as asyncio's does on Python 3.11; the library waits for connections."""

    def _resume(self) -> None:
        if self._is_serving:
            self._loop.add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        for _ in range(BACKLOG):
            try:
                connection, _ = self._listener.accept()
            except (BlockingIOError, InterruptedError, ConnectionAbortedError):
                return
            except OSError as error:
                self._pause(error)
                return
            connection.setblocking(False)
            opening = self._loop.create_task(self._open(connection))
            self._openings.add(opening)
            opening.add_done_callback(self._openings.discard)

    def _pause(self, error: OSError) -> None:
        """Report why no connection was accepted, and accept none for a while."""
        message = "cannot accept a connection"
        self._loop.call_exception_handler({"message": message, "exception": error})
        self._loop.remove_reader(self._listener)
        self._loop.call_later(RETRY_SECONDS, self._resume)

    async def _open(self, connection: socket.socket) -> None:
        try:
            await self._serve(connection)
        except (OSError, RuntimeError):  # the other side has gone, or failed the TLS handshake
            connection.close()
