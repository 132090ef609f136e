"""A client's connection to its server over a websocket.

Each message is sent in binary fragments of 1 MiB, so that neither side needs a second copy of a
large message in its buffers.  Messages are not compressed, because compression does not make
tensors smaller.  Exceptions raised by the websockets library, by TLS and by the operating system
are converted to exceptions of ``splitonnx.errors``.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
from http import HTTPStatus
from typing import cast

from websockets.exceptions import (
    ConnectionClosed,
    InvalidMessage,
    InvalidStatus,
    InvalidURI,
    WebSocketException,
)
from websockets.sync.client import connect as connect_websocket

from splitonnx.codecs import Chunk
from splitonnx.errors import (
    ConnectionLost,
    MessageTooLarge,
    ProtocolError,
    SplitonnxError,
    Unauthorized,
    UntrustedPeer,
    UsageError,
)
from splitonnx.interrupts import check_interrupt
from splitonnx.runtime.channels.bounded_connections import BoundedConnection, Stalled
from splitonnx.runtime.channels.channels import Dial
from splitonnx.runtime.channels.credentials import Credentials, check_url
from splitonnx.runtime.wire.close_codes import POLICY, TOO_BIG, describe_loss
from splitonnx.runtime.wire.fragments import split_message
from splitonnx.runtime.wire.tls import describe_failure
from splitonnx.runtime.wire.transports import Transport

OPEN_SECONDS = 10.0
"""Time limit in seconds for connecting, including TLS and HTTP."""
REPLY_SECONDS = 600.0
"""Seconds that a client waits for the first byte of a reply, while the server computes.

A server that computes may also stop reading, if large messages wait there.  Therefore, this is also
the longest time for which it may take nothing of what the client sends.
"""
MESSAGE_SECONDS = 60.0
"""Most seconds between the first and last byte of a reply, checked every quarter of that time."""
PING_SECONDS = 20.0
"""Seconds between pings."""
PONG_SECONDS = 60.0
"""Seconds within which the server must answer a ping; its answer may wait behind a fragment."""
CLOSE_SECONDS = 5.0
"""Seconds that the server has to answer the closing handshake."""


class WebSocketTransport:
    """A client's connection to a server over a websocket; see :class:`transports.Transport`.

    Three time limits apply, in seconds: ``open_seconds`` for opening the connection,
    ``reply_seconds`` for the wait until a message from the server starts, and ``message_seconds``
    for the time from the start of that message until it is complete.  ``reply_seconds`` is also the
    longest time for which the server may take nothing of a message that is sent to it.

    Raises:
        ConnectionLost: no server answers, or the server is full; the client may try again.
        Unauthorized: the server requires a token, or rejects the client's token or web origin.
        UntrustedPeer: the client does not trust the server's certificate, or the server does not
            trust the client's certificate.
        Redirected: the server redirects the client to another address.
        UsageError: ``url`` is not a websocket address, or does not match the credentials.
    """

    def __init__(
        self,
        url: str,
        *,
        credentials: Credentials | None = None,
        open_seconds: float = OPEN_SECONDS,
        reply_seconds: float = REPLY_SECONDS,
        message_seconds: float = MESSAGE_SECONDS,
    ) -> None:
        self.bytes_sent = 0
        self.bytes_received = 0
        self._url = url.partition("?")[0]  # for errors; a query may contain secrets
        self._reply_seconds = reply_seconds
        self._message_seconds = message_seconds
        self._opened = ExitStack()  # websockets wants to be used as a context manager
        credentials = credentials or Credentials()
        check_url(url, credentials)
        try:
            connecting = connect_websocket(
                url,
                additional_headers=make_headers(credentials),
                ssl=credentials.tls,
                compression=None,
                max_size=credentials.message_bytes,
                open_timeout=open_seconds,
                ping_interval=PING_SECONDS,
                ping_timeout=PONG_SECONDS,
                close_timeout=CLOSE_SECONDS,
                proxy=None,
                create_connection=BoundedConnection,
            )
            self._socket = cast("BoundedConnection", self._opened.enter_context(connecting))
        except (OSError, WebSocketException) as error:
            raise translate_opening(self._url, error) from error
        self._socket.limit_sending(reply_seconds)

    def send(self, chunks: Sequence[Chunk]) -> None:
        """Send ``chunks``, one after the other, as a single message.

        Raises:
            ConnectionLost: the message cannot be sent, or the server stopped taking it.
        """
        try:
            match split_message(chunks):
                case bytes() as content:
                    self._socket.send(content)
                case fragments:
                    self._socket.send_fragments(fragments)
        except (OSError, WebSocketException) as error:
            raise translate_end(self._url, error) from error
        self.bytes_sent += sum(map(len, chunks))

    def receive(self) -> Chunk | bytearray:
        """Wait for the next message and return it.

        One time limit applies until the message starts, and another until it is complete.

        Raises:
            ConnectionLost: the connection has ended, or the message did not arrive in time.
        """
        wait = ReplyWait(self._url, self._reply_seconds, self._message_seconds)
        while True:
            try:
                content = self._socket.receive(wait.patience)
            except TimeoutError:
                check_interrupt()
                wait.check(is_underway=self._socket.is_underway)
            except (OSError, WebSocketException) as error:
                raise translate_end(self._url, error) from error
            else:
                self.bytes_received += len(content)
                return content

    def close(self) -> None:
        """Close the connection; may be called twice."""
        self._opened.close()


class ReplyWait:
    """One wait for a message, with a time limit until it starts and one until it is complete.

    The caller waits for :attr:`patience` seconds at a time, and calls :meth:`check` after each.
    """

    def __init__(self, url: str, reply_seconds: float, message_seconds: float) -> None:
        self._url = url
        self._reply_seconds = reply_seconds
        self._message_seconds = message_seconds
        self._begin_by = time.monotonic() + reply_seconds
        self._end_by: float | None = None

    @property
    def patience(self) -> float:
        """Return how many seconds to wait before the next check."""
        deadline = self._begin_by if self._end_by is None else self._end_by
        return max(min(deadline - time.monotonic(), self._message_seconds / 4), 0)

    def check(self, *, is_underway: bool) -> None:
        """Check the time limits; ``is_underway`` tells whether part of a message has arrived.

        Raises:
            ConnectionLost: one of them was exceeded.
        """
        now = time.monotonic()
        if not is_underway:
            self._end_by = None
        elif self._end_by is None:
            self._end_by = now + self._message_seconds
        if self._end_by is None and now >= self._begin_by:
            raise ConnectionLost(self._url, f"no reply within {self._reply_seconds:g} s")
        if self._end_by is not None and now >= self._end_by:
            raise ConnectionLost(self._url, f"a reply took longer than {self._message_seconds:g} s")


def make_headers(credentials: Credentials) -> dict[str, str]:
    """Return the headers of the handshake's HTTP request that show who the client is."""
    return {} if credentials.token is None else {"Authorization": f"Bearer {credentials.token}"}


def translate_end(url: str, error: Exception) -> ProtocolError:
    """Return the error that says why an open connection to ``url`` ended."""
    lost = describe_loss(url, error)
    cause = error.__cause__
    if isinstance(cause, ssl.SSLError):
        return _translate_failure(url, cause)
    if isinstance(cause, Stalled):
        return describe_loss(url, cause)
    if not isinstance(error, ConnectionClosed) or (close := error.rcvd or error.sent) is None:
        return lost
    if close.code == TOO_BIG:
        mine, reason = error.rcvd is not None, close.reason
        return MessageTooLarge(url, is_outgoing=mine, reason=reason)
    if close.code == POLICY and error.rcvd is not None:
        return Unauthorized(url, POLICY, close.reason or "no reason given")
    return lost


def translate_opening(url: str, error: Exception) -> SplitonnxError:
    """Return the error that says why a connection to ``url`` could not be opened."""
    if isinstance(error, InvalidURI):
        return UsageError(f"'{url}' is not a websocket address such as ws://host:8765")
    if isinstance(error, InvalidStatus):
        return _translate_status(url, error)
    return _translate_failure(url, error)


def _translate_status(url: str, error: InvalidStatus) -> ConnectionLost | Unauthorized:
    response = error.response
    said = " ".join(bytes(response.body or b"")[:200].decode("utf-8", "replace").split())
    if response.status_code in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        return Unauthorized(url, response.status_code, said or response.reason_phrase)
    reason = f"HTTP {response.status_code}: {said or response.reason_phrase}"
    return ConnectionLost(url, reason, response.status_code)


def _translate_failure(url: str, error: Exception) -> ConnectionLost | UntrustedPeer:
    failure = describe_failure(error) if isinstance(error, ssl.SSLError) else None
    if failure is not None:
        return UntrustedPeer(url, failure)
    lost = describe_loss(url, error)
    cut = ssl.SSLError | InvalidMessage | ConnectionClosed | ConnectionResetError | BrokenPipeError
    if url.startswith("wss:") and isinstance(error, cut):
        # asyncio often closes the connection before it has sent the TLS alert with the reason
        lost.reason += "; it may want a certificate of this side (--cert, --key)"
    return lost


def connect(url: str, *, credentials: Credentials | None = None) -> WebSocketTransport:
    """Connect to the server at ``url``, such as ``ws://127.0.0.1:8765``.

    Raises:
        ConnectionLost, Unauthorized, UntrustedPeer, Redirected, UsageError: see
            :class:`WebSocketTransport`.
    """
    check_interrupt()  # a channel may repeat this without end
    return WebSocketTransport(url, credentials=credentials)


def split_address(
    server: str | Transport | Dial, credentials: Credentials | None
) -> tuple[Dial | None, Transport | None]:
    """Return the function that connects to a server, or the open transport.

    Raises:
        UsageError: credentials were given, but ``server`` is not a URL.
    """
    if isinstance(server, str):
        return partial(connect, server, credentials=credentials), None
    if credentials is not None:
        raise UsageError("access is for a server's URL")
    return (server, None) if callable(server) else (None, server)
