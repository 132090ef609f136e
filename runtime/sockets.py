"""Messages over websockets, from both ends; :mod:`guards` watches over the server's.

Messages travel as binary frames without compression, which tensors do not gain from, cut into
fragments of 1 MiB, so that neither side needs a second copy of a large message in its buffers.
Every exception of websockets, of TLS and of the operating system is translated here.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from functools import partial
from http import HTTPStatus
from typing import TYPE_CHECKING, cast

from websockets.asyncio.server import ServerConnection
from websockets.asyncio.server import serve as serve_websockets
from websockets.exceptions import (
    ConnectionClosed,
    InvalidMessage,
    InvalidStatus,
    InvalidURI,
    WebSocketException,
)
from websockets.frames import CloseCode
from websockets.sync.client import connect as connect_websocket

from splitonnx.codecs import Chunk
from splitonnx.errors import (
    ConnectionLost,
    MessageTooLarge,
    ProtocolError,
    ServerBusy,
    Unauthorized,
    UntrustedPeer,
    UsageError,
)
from splitonnx.runtime.accesses import Access, check_url
from splitonnx.runtime.certificates import describe_failure
from splitonnx.runtime.client_connections import BoundedConnection
from splitonnx.runtime.doors import ignore_scarcity, open_doors
from splitonnx.runtime.fragments import JoinedFragments, split_message
from splitonnx.runtime.guards import ANSWER_SECONDS, CLOSE_SECONDS, Guest, Hall
from splitonnx.runtime.identities import Identity, Role
from splitonnx.runtime.limits import Limits
from splitonnx.runtime.origins import check_origins
from splitonnx.runtime.refusals import Authorize, OnRefusal, Refusal, Respond

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

OPEN_SECONDS = 10.0
"""Seconds to connect, TLS and HTTP included."""
REPLY_SECONDS = 600.0
"""Seconds that a client waits for a reply's beginning, the server's computing included."""
MESSAGE_SECONDS = 60.0
"""Seconds from a reply's first byte to its last, noticed within a quarter of that."""
PING_SECONDS = 20.0
"""Seconds between pings."""
PONG_SECONDS = 60.0
"""Seconds in which a server has to answer one; on a slow link it waits behind a fragment."""
RESTART = 1012
"""The closing code of a server that stops, and may come again."""
BUSY = 1013
"""The closing code of a server that has no room now."""
POLICY = 1008
"""The closing code of a server that wants a token, or another one."""
TOO_BIG = 1009
"""The closing code for a message over the limit of its receiver."""


def _translate(peer: str, error: Exception) -> ConnectionLost:
    if not isinstance(error, ConnectionClosed):
        return ConnectionLost(peer, " ".join(str(error).split()) or type(error).__name__)
    close = error.rcvd or error.sent
    if close is None:
        return ConnectionLost(peer, "it closed without a word")
    return ConnectionLost(peer, f"it closed ({close})", close.code)


class WebSocketTransport:
    """A client's connection to a server over a websocket; see :class:`transports.Transport`.

    Raises:
        ConnectionLost: nobody answers there, or the server is full: try again.
        Unauthorized: the server wants a token, or another one, or no page of this origin.
        UntrustedPeer: TLS found the server to be somebody else, or the server found us so.
        Redirected: the server names another address.
        UsageError: ``url`` is no websocket address.
    """

    def __init__(
        self,
        url: str,
        *,
        access: Access | None = None,
        open_seconds: float = OPEN_SECONDS,
        reply_seconds: float = REPLY_SECONDS,
        message_seconds: float = MESSAGE_SECONDS,
    ) -> None:
        self.bytes_sent = 0
        self.bytes_received = 0
        self._url = url.partition("?")[0]  # as errors tell it: what follows may be a secret
        self._reply_seconds = reply_seconds
        self._message_seconds = message_seconds
        self._opened = ExitStack()  # websockets wants to be used as a context manager
        access = access or Access()
        check_url(url, access)
        headers = {} if access.token is None else {"Authorization": f"Bearer {access.token}"}
        try:
            connecting = connect_websocket(
                url,
                additional_headers=headers,
                ssl=access.tls,
                compression=None,
                max_size=access.message_bytes,
                open_timeout=open_seconds,
                ping_interval=PING_SECONDS,
                ping_timeout=PONG_SECONDS,
                close_timeout=CLOSE_SECONDS,
                proxy=None,
                create_connection=BoundedConnection,
            )
            self._socket = cast("BoundedConnection", self._opened.enter_context(connecting))
        except InvalidURI as error:
            raise UsageError(
                f"'{self._url}' is no websocket address such as ws://host:8765"
            ) from error
        except InvalidStatus as error:
            raise _translate_status(self._url, error) from error
        except (OSError, WebSocketException) as error:
            raise _translate_opening(self._url, error) from error

    def send(self, chunks: Sequence[Chunk]) -> None:
        """Send chunks as one message."""
        try:
            self._socket.send(split_message(chunks))
        except (OSError, WebSocketException) as error:
            raise self._explain(error) from error
        self.bytes_sent += sum(map(len, chunks))

    def receive(self) -> bytes:
        """Wait for the next message: for its beginning, and then for its end."""
        begin_by = time.monotonic() + self._reply_seconds
        end_by: float | None = None
        while True:
            deadline = begin_by if end_by is None else end_by
            patience = min(deadline - time.monotonic(), self._message_seconds / 4)
            try:
                content = self._socket.recv(max(patience, 0), decode=False)
            except TimeoutError:
                if not self._is_underway():
                    end_by = None
                elif end_by is None:
                    end_by = time.monotonic() + self._message_seconds
                self._check_patience(begin_by, end_by)
            except (OSError, WebSocketException) as error:
                raise self._explain(error) from error
            else:
                self._socket.take(len(content))
                self.bytes_received += len(content)
                return content

    def close(self) -> None:
        """End the connection; may be called twice."""
        self._opened.close()

    def _is_underway(self) -> bool:
        """Whether part of a message has come; read beside the thread that writes it."""
        protocol = self._socket.protocol
        return protocol.current_size is not None or bool(protocol.reader.buffer)

    def _check_patience(self, begin_by: float, end_by: float | None) -> None:
        now = time.monotonic()
        if end_by is None and now >= begin_by:
            raise ConnectionLost(self._url, f"no reply within {self._reply_seconds:g} s")
        if end_by is not None and now >= end_by:
            raise ConnectionLost(self._url, f"a reply took longer than {self._message_seconds:g} s")

    def _explain(self, error: Exception) -> ProtocolError:
        lost = _translate(self._url, error)
        cause = error.__cause__
        if isinstance(cause, ssl.SSLError):
            return _translate_opening(self._url, cause)
        if not isinstance(error, ConnectionClosed) or (close := error.rcvd or error.sent) is None:
            return lost
        if close.code == TOO_BIG:
            mine, reason = error.rcvd is not None, close.reason
            return MessageTooLarge(self._url, is_outgoing=mine, reason=reason)
        if close.code == POLICY and error.rcvd is not None:
            return Unauthorized(self._url, POLICY, close.reason or "it does not say why")
        return lost


def _translate_status(url: str, error: InvalidStatus) -> ConnectionLost | Unauthorized:
    response = error.response
    said = " ".join(bytes(response.body or b"")[:200].decode("utf-8", "replace").split())
    if response.status_code in (HTTPStatus.UNAUTHORIZED, HTTPStatus.FORBIDDEN):
        return Unauthorized(url, response.status_code, said or response.reason_phrase)
    reason = f"HTTP {response.status_code}: {said or response.reason_phrase}"
    return ConnectionLost(url, reason, response.status_code)


def _translate_opening(url: str, error: Exception) -> ConnectionLost | UntrustedPeer:
    failure = describe_failure(error) if isinstance(error, ssl.SSLError) else None
    if failure is not None:
        return UntrustedPeer(url, failure)
    lost = _translate(url, error)
    cut = ssl.SSLError | InvalidMessage | ConnectionClosed | ConnectionResetError | BrokenPipeError
    if url.startswith("wss:") and isinstance(error, cut):
        # asyncio closes before the alert that says so is on its way, as often as not
        lost.reason += "; it may want a certificate of this side (--cert, --key)"
    return lost


def connect(url: str, *, access: Access | None = None) -> WebSocketTransport:
    """Connect to a server, such as ``ws://127.0.0.1:8765``.

    Raises:
        ConnectionLost, Unauthorized, UntrustedPeer, Redirected, UsageError: see
            :class:`WebSocketTransport`.
    """
    return WebSocketTransport(url, access=access)


class Peer:
    """A client as its server sees it; raises ConnectionLost like a transport."""

    def __init__(self, guest: Guest, hall: Hall) -> None:
        self._guest = guest
        self._hall = hall
        self.name = guest.name

    @property
    def owner(self) -> str | None:
        """Whom the token or certificate belongs to, ``""`` where none is needed, ``None`` for a
        stranger."""
        return self._guest.owner

    @property
    def is_sending(self) -> bool:
        """Whether part of a message has come that was not received yet."""
        return self._guest.is_underway or self._guest.kept > 0

    @property
    def roles(self) -> frozenset[Role]:
        """What whoever connected may do; nothing for a stranger."""
        identity = self._guest.identity
        return frozenset() if identity is None else identity.roles

    async def admit(self, identity: Identity) -> None:
        """Lift the limits that hold before a token was shown.

        They may still hold for what a client sends before it has had an answer.

        Raises:
            ServerBusy: there are as many clients as the limits allow, in all or of this owner;
                close with ``BUSY``.
        """
        limits = self._hall.limits
        match self._hall.admit(self._guest, identity):
            case None:
                return
            case Refusal.TOO_MANY_CLIENTS_OF_TOKEN:
                raise ServerBusy(f"{limits.clients_per_token} clients of one token's owner")
            case _:
                raise ServerBusy(f"{limits.clients} clients")

    async def send(self, chunks: Sequence[Chunk]) -> None:
        """Send chunks as one message; whoever does not take it in time is cut off."""
        seconds = self._hall.limits.idle_seconds
        try:
            async with asyncio.timeout(seconds):
                await self._guest.send(split_message(chunks))
        except TimeoutError as error:
            self._guest.cut_off(Refusal.REPLY_TOO_SLOW)
            reason = f"it did not take a reply within {seconds:g} s"
            raise ConnectionLost(self.name, reason) from error
        except (OSError, WebSocketException) as error:
            raise self._explain(error) from error

    async def receive(self) -> bytes | bytearray:
        """Wait for the next message, as long as the limits allow."""
        fragments = self._guest.recv_streaming(decode=False)
        content = JoinedFragments()
        idle_seconds = self._hall.limits.idle_seconds
        try:
            async with asyncio.timeout(idle_seconds) as idle:
                async for part in fragments:
                    idle.reschedule(None)  # the guard looks at what has begun
                    content.add(part)
                    self._guest.take(len(part))
        except TimeoutError as error:
            reason = f"silent for {idle_seconds:g} s"
            self._guest.refuse(Refusal.IDLE, CloseCode.GOING_AWAY, reason)
            raise ConnectionLost(self.name, reason) from error
        except (OSError, WebSocketException) as error:
            raise self._explain(error) from error
        return content.join()

    async def wait_closed(self) -> None:
        """Wait until the connection has ended, from whichever side."""
        await self._guest.wait_closed()

    async def close(self, code: int = CloseCode.NORMAL_CLOSURE, reason: str = "") -> None:
        """End the connection; may be called twice, and waits a little for the other side."""
        await self._guest.close(code, reason.encode()[:120].decode(errors="ignore"))

    def dismiss(self, code: int, reason: str) -> None:
        """End the connection without waiting; the other side is told why, if it reads."""
        self._guest.dismiss(code, reason)

    def _explain(self, error: Exception) -> ConnectionLost:
        lost = _translate(self.name, error)
        if self._guest.refusal is not None:
            lost.reason = f"ended here: {self._guest.refusal}"
        return lost


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
    """Serve clients while the context lasts, and give the port; 0 takes any free one.

    ``handle`` is called for each client that is through its handshake, and the connection ends
    when it returns.  A token in the request's header is shown to ``authorize``, which tells whom it
    stands for or ``None``: then HTTP 401.  Without a token in the header a client comes in as a
    stranger, whom ``handle`` may admit.  Without ``authorize`` everybody is admitted, as the common
    name in the certificate that ``tls`` asked for, else as ``""``.

    ``respond`` answers HTTP requests on the same port, before anything else becomes of them.
    Requests that name an origin come from web pages: they are refused (403) unless ``origins`` has
    it, or, with ``has_pages``, this server gave the page out.  ``on_refusal`` is told of everything
    that is refused here.  At the end, clients are told that the server restarts (1012).

    Raises:
        PortInUse: another program has the port.
        UsageError: the address is none of this machine's, or an origin is none.
    """
    hall = Hall(
        limits or Limits(),
        authorize=authorize,
        respond=respond,
        origins=check_origins(origins),
        on_refusal=on_refusal,
        has_tls=tls is not None,
        has_pages=has_pages,
        host=host.lower(),
    )

    async def welcome(socket: ServerConnection) -> None:
        assert isinstance(socket, Guest)
        socket.open()
        await handle(Peer(socket, hall))

    doors = open_doors(host, port, hall.entrance)
    asyncio.get_running_loop().set_exception_handler(ignore_scarcity)
    async with AsyncExitStack() as open_servers:
        for door in doors:
            server = await serve_websockets(
                welcome,
                sock=door,
                ssl=tls,
                process_request=hall.answer,
                compression=None,
                max_size=hall.limits.stranger_bytes,
                open_timeout=ANSWER_SECONDS,  # the guard looks at the handshake
                ssl_handshake_timeout=hall.limits.handshake_seconds if tls else None,
                ping_interval=PING_SECONDS,
                ping_timeout=None,  # the guard listens for more than pongs
                close_timeout=CLOSE_SECONDS,
                server_header=None,
                create_connection=cast("type[ServerConnection]", partial(Guest, hall)),
            )
            open_servers.push_async_callback(server.wait_closed)
            open_servers.callback(server.close, code=RESTART, reason="the server restarts")
        yield doors[0].getsockname()[1]
