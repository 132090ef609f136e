"""A client's connection to its server over a websocket, on an event loop.

Messages, limits and errors are those of :class:`channels.websockets.WebSocketTransport`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial
from typing import Self, cast
from urllib.parse import urlsplit

from websockets.asyncio.client import connect as connect_websocket
from websockets.exceptions import WebSocketException

from splitonnx.codecs import Chunk
from splitonnx.errors import UsageError
from splitonnx.runtime.channels.asynchronous.connections import BoundedAsyncConnection
from splitonnx.runtime.channels.asynchronous.transports import AsyncDial
from splitonnx.runtime.channels.credentials import Credentials, check_url
from splitonnx.runtime.channels.websockets import (
    CLOSE_SECONDS,
    MESSAGE_SECONDS,
    OPEN_SECONDS,
    PING_SECONDS,
    PONG_SECONDS,
    REPLY_SECONDS,
    ReplyWait,
    make_headers,
    translate_end,
    translate_opening,
)
from splitonnx.runtime.wire.fragments import split_message


class AsyncWebSocketTransport:
    """A client's connection over a websocket; see :class:`transports.AsyncTransport`.

    Create it with :meth:`open`.  Time limits are those of
    :class:`~splitonnx.runtime.channels.websockets.WebSocketTransport`.
    """

    def __init__(
        self,
        connection: BoundedAsyncConnection,
        url: str,
        *,
        reply_seconds: float,
        message_seconds: float,
    ) -> None:
        self._connection = connection
        self._url = url
        self._reply_seconds = reply_seconds
        connection.limit_sending(reply_seconds)
        self._message_seconds = message_seconds

    @classmethod
    async def open(
        cls,
        url: str,
        *,
        credentials: Credentials | None = None,
        open_seconds: float = OPEN_SECONDS,
        reply_seconds: float = REPLY_SECONDS,
        message_seconds: float = MESSAGE_SECONDS,
    ) -> Self:
        """Connect to the server at ``url``, such as ``ws://127.0.0.1:8765``.

        Raises:
            ConnectionLost, Unauthorized, UntrustedPeer, Redirected, UsageError: see
                :class:`~splitonnx.runtime.channels.websockets.WebSocketTransport`.
        """
        credentials = credentials or Credentials()
        check_url(url, credentials)
        shown = url.partition("?")[0]  # for errors; a query may contain secrets
        is_encrypted = urlsplit(url).scheme == "wss"
        try:
            connection = await connect_websocket(
                url,
                additional_headers=make_headers(credentials),
                ssl=(credentials.tls or True) if is_encrypted else None,
                compression=None,
                max_size=credentials.message_bytes,
                open_timeout=open_seconds,
                ping_interval=PING_SECONDS,
                ping_timeout=PONG_SECONDS,
                close_timeout=CLOSE_SECONDS,
                proxy=None,
                create_connection=BoundedAsyncConnection,
            )
        except (OSError, WebSocketException) as error:
            raise translate_opening(shown, error) from error
        return cls(
            cast("BoundedAsyncConnection", connection),
            shown,
            reply_seconds=reply_seconds,
            message_seconds=message_seconds,
        )

    async def send(self, chunks: Sequence[Chunk]) -> None:
        """Send ``chunks``, one after the other, as a single message.

        Raises:
            ConnectionLost: the message cannot be sent, or the server stopped taking it.
        """
        try:
            match split_message(chunks):
                case bytes() as content:
                    await self._connection.send(content)
                case fragments:
                    await self._connection.send_fragments(fragments)
        except (OSError, WebSocketException) as error:
            raise translate_end(self._url, error) from error
        except asyncio.CancelledError:
            self.abort()  # the message may be sent in part
            raise

    async def receive(self) -> Chunk | bytearray:
        """Wait for the next message and return it.

        One time limit applies until the message starts, and another until it is complete.

        Raises:
            ConnectionLost: the connection has ended, or the message did not arrive in time.
        """
        wait = ReplyWait(self._url, self._reply_seconds, self._message_seconds)
        while True:
            try:
                async with asyncio.timeout(wait.patience):
                    return await self._connection.receive()
            except TimeoutError:
                wait.check(is_underway=self._connection.is_underway)
            except (OSError, WebSocketException) as error:
                raise translate_end(self._url, error) from error

    async def close(self) -> None:
        """Close the connection; may be called twice."""
        try:
            await self._connection.close()
        except asyncio.CancelledError:
            self.abort()
            raise

    def abort(self) -> None:
        """Close the connection without the closing handshake; may be called twice."""
        self._connection.transport.abort()


async def connect(url: str, *, credentials: Credentials | None = None) -> AsyncWebSocketTransport:
    """Connect to the server at ``url``, such as ``ws://127.0.0.1:8765``.

    Raises:
        ConnectionLost, Unauthorized, UntrustedPeer, Redirected, UsageError: see
            :meth:`AsyncWebSocketTransport.open`.
    """
    return await AsyncWebSocketTransport.open(url, credentials=credentials)


def choose_dial(server: str | AsyncDial, credentials: Credentials | None) -> AsyncDial:
    """Return the function that connects to a server.

    Raises:
        UsageError: credentials were given, but ``server`` is not a URL.
    """
    if isinstance(server, str):
        return partial(connect, server, credentials=credentials)
    if credentials is not None:
        raise UsageError("access is for a server's URL")
    return server
