"""Messages over websockets: the only module that imports websockets.

Messages travel as binary frames without compression, which tensors do not gain from, cut into
fragments of 1 MiB, so that neither side needs a second copy of a large message in its buffers.
Every exception of websockets and of the operating system is translated here.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, asynccontextmanager
from typing import TYPE_CHECKING

from websockets.asyncio.server import ServerConnection
from websockets.asyncio.server import serve as serve_websockets
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidURI, WebSocketException
from websockets.sync.client import connect as connect_websocket

from splitonnx.codecs import Chunk
from splitonnx.errors import ConnectionLost, PortInUse, UsageError

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

FRAGMENT = 1 << 20
"""Bytes of one fragment."""
MAX_MESSAGE = 1 << 30
"""Bytes of one message, over which the connection is ended before the rest is read."""
OPEN_TIMEOUT = 10.0
"""Seconds to connect."""
REPLY_TIMEOUT = 600.0
"""Seconds that a client waits for a reply, the server's computing included."""
MESSAGE_TIMEOUT = 60.0
"""Seconds from a message's first fragment to its last, however many pings are answered."""


def _split(chunks: Sequence[Chunk]) -> Iterator[Chunk]:
    for chunk in chunks:
        view = memoryview(chunk)
        for start in range(0, len(view), FRAGMENT):
            yield view[start : start + FRAGMENT]


def _describe(error: Exception) -> str:
    if isinstance(error, ConnectionClosed):
        reason = error.rcvd or error.sent
        return f"it closed ({reason})" if reason else "it closed without a word"
    return " ".join(str(error).split()) or type(error).__name__


class WebSocketTransport:
    """A client's connection to a server over a websocket; see :class:`transports.Transport`."""

    def __init__(
        self, url: str, *, open_timeout: float = OPEN_TIMEOUT, reply_timeout: float = REPLY_TIMEOUT
    ) -> None:
        self.bytes_sent = 0
        self.bytes_received = 0
        self._url = url
        self._reply_timeout = reply_timeout
        self._opened = ExitStack()  # websockets wants to be used as a context manager
        try:
            connecting = connect_websocket(
                url, compression=None, max_size=MAX_MESSAGE, open_timeout=open_timeout, proxy=None
            )
            self._socket = self._opened.enter_context(connecting)
        except InvalidURI as error:
            raise UsageError(f"'{url}' is no websocket address such as ws://host:8765") from error
        except (OSError, InvalidHandshake) as error:
            raise ConnectionLost(url, _describe(error)) from error

    def send(self, chunks: Sequence[Chunk]) -> None:
        """Send chunks as one message."""
        try:
            self._socket.send(_split(chunks))
        except (OSError, WebSocketException) as error:
            raise ConnectionLost(self._url, _describe(error)) from error
        self.bytes_sent += sum(len(chunk) for chunk in chunks)

    def receive(self) -> bytes:
        """Wait for the next message."""
        try:
            content = self._socket.recv(self._reply_timeout, decode=False)
        except TimeoutError as error:
            reason = f"no reply within {self._reply_timeout:g} s"
            raise ConnectionLost(self._url, reason) from error
        except (OSError, WebSocketException) as error:
            raise ConnectionLost(self._url, _describe(error)) from error
        self.bytes_received += len(content)
        return content

    def close(self) -> None:
        """End the connection; may be called twice."""
        self._opened.close()


def connect(url: str) -> WebSocketTransport:
    """Connect to a server, such as ``ws://127.0.0.1:8765``.

    Raises:
        ConnectionLost: nobody answers there.
        UsageError: ``url`` is no websocket address.
    """
    return WebSocketTransport(url)


class Peer:
    """A client as its server sees it; raises ConnectionLost like a transport."""

    def __init__(self, socket: ServerConnection) -> None:
        self._socket = socket
        host, port, *_ = socket.remote_address
        self.name = f"{host}:{port}"

    async def send(self, chunks: Sequence[Chunk]) -> None:
        """Send chunks as one message."""
        try:
            await self._socket.send(_split(chunks))
        except (OSError, WebSocketException) as error:
            raise ConnectionLost(self.name, _describe(error)) from error

    async def receive(self) -> bytes:
        """Wait for the next message: for its beginning as long as it takes, then for its end."""
        fragments = self._socket.recv_streaming(decode=False)
        try:
            parts = [await anext(fragments)]
            async with asyncio.timeout(MESSAGE_TIMEOUT):
                parts += [part async for part in fragments]
        except TimeoutError as error:
            reason = f"a message took longer than {MESSAGE_TIMEOUT:g} s"
            raise ConnectionLost(self.name, reason) from error
        except (OSError, WebSocketException) as error:
            raise ConnectionLost(self.name, _describe(error)) from error
        return parts[0] if len(parts) == 1 else b"".join(parts)


@asynccontextmanager
async def serve(
    handle: Callable[[Peer], Awaitable[None]], host: str, port: int
) -> AsyncIterator[int]:
    """Serve clients while the context lasts, and give the port; 0 takes any free one.

    ``handle`` is called for each client; the connection ends when it returns.

    Raises:
        PortInUse: another program has the port.
        UsageError: the address is none of this machine's.
    """

    async def welcome(socket: ServerConnection) -> None:
        await handle(Peer(socket))

    try:
        server = await serve_websockets(welcome, host, port, compression=None, max_size=MAX_MESSAGE)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise PortInUse(host, port) from error
        raise UsageError(f"cannot listen on {host}:{port}: {error.strerror}") from error
    try:
        yield next(iter(server.sockets)).getsockname()[1]
    finally:
        server.close()
        await server.wait_closed()
