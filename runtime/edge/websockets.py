"""A server's websocket connections to its clients.

:mod:`connections` enforces the limits on each connection.  Exceptions raised by the websockets
library, by TLS and by the operating system are converted to exceptions of ``splitonnx.errors``.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, cast

from websockets.asyncio.server import ServerConnection
from websockets.asyncio.server import serve as serve_websockets
from websockets.exceptions import WebSocketException
from websockets.frames import CloseCode
from websockets.http11 import Request, Response

from splitonnx.codecs import Chunk
from splitonnx.errors import ConnectionLost, FormatError, ServerBusy, Unauthorized
from splitonnx.messages import Fault, Login, decode_message, encode_message
from splitonnx.runtime.edge.admissions import Admission
from splitonnx.runtime.edge.connections import ANSWER_SECONDS, CLOSE_SECONDS, LimitedConnection
from splitonnx.runtime.edge.http import Authorize, OnRefusal, Refusal, Respond
from splitonnx.runtime.edge.listeners import ignore_scarcity, open_listeners
from splitonnx.runtime.edge.origins import check_origins
from splitonnx.runtime.edge.tokens import Identity, Role
from splitonnx.runtime.limits import Limits
from splitonnx.runtime.wire.close_codes import POLICY, RESTART, describe_loss
from splitonnx.runtime.wire.fragments import split_message

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

PING_SECONDS = 20.0
"""Seconds between pings."""


class Peer:
    """The server's side of a client's connection.

    :meth:`send` and :meth:`receive` raise ConnectionLost if the connection has ended.
    """

    def __init__(self, connection: LimitedConnection, admission: Admission) -> None:
        self._connection = connection
        self._admission = admission
        self.name = connection.name

    @property
    def owner(self) -> str | None:
        """Return the owner of the client's token or certificate.

        The result is ``""`` if the client needs neither, and ``None`` if it has not shown a
        required token yet.
        """
        return self._connection.owner

    @property
    def is_sending(self) -> bool:
        """Return whether the client has sent any data that :meth:`receive` has not returned yet."""
        return self._connection.is_underway or self._connection.kept > 0

    @property
    def roles(self) -> frozenset[Role]:
        """Return the client's roles; the set is empty until the client has shown a token."""
        identity = self._connection.identity
        return frozenset() if identity is None else identity.roles

    async def log_in(self, content: Chunk | bytearray, find: Authorize | None) -> str:
        """Admit a client by the token in its first message, and return the token's owner.

        ``find`` returns the identity that belongs to a token, or ``None`` for an unknown token.

        Raises:
            Unauthorized: the message contains no known token; the client is told so.
            ServerBusy: see :meth:`admit`.
        """
        try:
            message, _ = decode_message(content)
        except FormatError:
            message = None
        found = None
        if isinstance(message, Login) and find is not None:
            found = find(message.token)
        if found is None:
            error = Unauthorized(self.name, POLICY, "no token that is known here")
            fault = Fault(code=type(error).__name__, reason=error.reason)
            await self.send(encode_message(fault))
            raise error
        await self.admit(found)
        return found.owner

    async def admit(self, identity: Identity) -> None:
        """Record the client's identity, and lift the limits on unauthenticated connections.

        Data that the client sends before it receives an answer may still be subject to those
        limits.

        Raises:
            ServerBusy: there are too many clients, in total or for this owner; the caller must
                close the connection with code ``BUSY``.
        """
        limits = self._admission.limits
        match self._admission.admit(self._connection, identity):
            case None:
                return
            case Refusal.TOO_MANY_CLIENTS_OF_TOKEN:
                raise ServerBusy(f"{limits.clients_per_token} clients of one token's owner")
            case _:
                raise ServerBusy(f"{limits.clients} clients")

    async def send(self, chunks: Sequence[Chunk]) -> None:
        """Send chunks as one message; disconnect the client if it does not read them in time."""
        seconds = self._admission.limits.idle_seconds
        try:
            async with asyncio.timeout(seconds):
                match split_message(chunks):
                    case bytes() as content:
                        await self._connection.send(content)
                    case fragments:
                        await self._connection.send_fragments(fragments)
        except TimeoutError as error:
            self._connection.cut_off(Refusal.REPLY_TOO_SLOW)
            reason = f"it did not take a reply within {seconds:g} s"
            raise ConnectionLost(self.name, reason) from error
        except (OSError, WebSocketException) as error:
            raise self._explain(error) from error

    async def receive(self) -> Chunk | bytearray:
        """Wait for the next message; disconnect the client if it stays silent for too long."""
        idle_seconds = self._admission.limits.idle_seconds
        try:
            async with asyncio.timeout(idle_seconds) as idle:
                return await self._connection.receive(partial(_stop_timeout, idle))
        except TimeoutError as error:
            reason = f"silent for {idle_seconds:g} s"
            self._connection.refuse(Refusal.IDLE, CloseCode.GOING_AWAY, reason)
            raise ConnectionLost(self.name, reason) from error
        except (OSError, WebSocketException) as error:
            raise self._explain(error) from error

    def read_ahead(self, size: int) -> None:
        """Allow a message of ``size`` bytes to arrive while the server handles others.

        The client has sent one as large already, so it can make the server keep twice as much.
        """
        self._connection.read_ahead(size)

    async def wait_closed(self) -> None:
        """Wait until either side has closed the connection."""
        await self._connection.wait_closed()

    async def close(self, code: int = CloseCode.NORMAL_CLOSURE, reason: str = "") -> None:
        """Close the connection and wait briefly for the other side; may be called twice."""
        await self._connection.close(code, reason.encode()[:120].decode(errors="ignore"))

    def dismiss(self, code: int, reason: str) -> None:
        """Close the connection without waiting; send the reason if the client is reading."""
        self._connection.dismiss(code, reason)

    def _explain(self, error: Exception) -> ConnectionLost:
        lost = describe_loss(self.name, error)
        if self._connection.refusal is not None:
            lost.reason = f"ended here: {self._connection.refusal}"
        return lost


def _stop_timeout(idle: asyncio.Timeout) -> None:
    """Let a message that has begun take longer; the connection limits its time."""
    if not idle.expired():
        idle.reschedule(None)


def _ignore(refusal: Refusal, name: str) -> None:
    pass


@asynccontextmanager
async def serve(
    handle: Callable[[Peer], Awaitable[None]],
    host: str,
    port: int,
    *,
    limits: Limits | None = None,
    tls: ssl.SSLContext | None = None,
    origins: Sequence[str] = (),
    authorize: Authorize | None = None,
    respond: Respond | None = None,
    has_pages: bool = False,
    on_refusal: OnRefusal = _ignore,
) -> AsyncIterator[int]:
    """Serve clients while the context is open, and yield the port; port 0 selects any free port.

    ``handle`` is called for each client after its handshake, and the connection is closed when the
    call returns.  ``authorize`` is called with the token from the request's header, and returns the
    token's identity, or ``None`` to refuse the client with HTTP 401.  A client that sends no token
    in the header is connected without authentication, and ``handle`` may admit it later.  Without
    ``authorize``, every client is admitted; its owner is the common name in its certificate if
    ``tls`` requests certificates, and ``""`` otherwise.

    ``respond`` answers HTTP requests on the same port.  Requests with an origin come from web
    pages: they are refused (403) unless ``origins`` contains the origin, or ``has_pages`` is true
    and the page came from this server.  ``on_refusal`` is called for every refused request or
    connection.
    When the context ends, clients are told that the server is restarting (code 1012).

    Raises:
        PortInUse: another program is using the port.
        UsageError: this machine cannot listen on the address, or an origin is invalid.
    """
    admission = Admission(
        limits or Limits(),
        authorize=authorize,
        respond=respond,
        origins=check_origins(origins),
        on_refusal=on_refusal,
        has_tls=tls is not None,
        has_pages=has_pages,
        host=host.lower(),
    )

    def answer(socket: ServerConnection, request: Request) -> Response | Awaitable[Response] | None:
        assert isinstance(socket, LimitedConnection)
        return admission.answer(socket, request)

    async def welcome(socket: ServerConnection) -> None:
        assert isinstance(socket, LimitedConnection)
        socket.open()
        await handle(Peer(socket, admission))

    listeners = open_listeners(host, port, admission.quota)
    asyncio.get_running_loop().set_exception_handler(ignore_scarcity)
    async with AsyncExitStack() as open_servers:
        for listener in listeners:
            server = await serve_websockets(
                welcome,
                sock=listener,
                ssl=tls,
                process_request=answer,
                compression=None,
                max_size=admission.limits.unauthenticated_bytes,
                open_timeout=ANSWER_SECONDS,  # the connection limits the handshake's time
                ssl_handshake_timeout=admission.limits.handshake_seconds if tls else None,
                ping_interval=PING_SECONDS,
                ping_timeout=None,  # the connection accepts any byte as a sign of life
                close_timeout=CLOSE_SECONDS,
                server_header=None,
                create_connection=cast(
                    "type[ServerConnection]", partial(LimitedConnection, admission)
                ),
            )
            open_servers.push_async_callback(server.wait_closed)
            open_servers.callback(server.close, code=RESTART, reason="the server restarts")
        yield listeners[0].getsockname()[1]
