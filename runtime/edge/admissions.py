"""Admission of connections: which clients are connected to a server, and whether more may connect.

This module counts authenticated and unauthenticated connections, and the bytes of long HTTP
responses that are buffered for clients.  :mod:`connections` enforces the limits on each connection,
and calls this module when a connection opens or closes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from functools import partial
from typing import Protocol

from websockets.frames import CloseCode
from websockets.http11 import Request, Response

from splitonnx.runtime.edge.http import (
    Authorize,
    HttpResponse,
    LaterResponse,
    OnRefusal,
    Refusal,
    Respond,
    deny_busy,
    make_response,
)
from splitonnx.runtime.edge.listeners import BACKLOG, HandshakeQuota
from splitonnx.runtime.edge.origins import Origins
from splitonnx.runtime.edge.request_policies import RequestPolicy
from splitonnx.runtime.edge.tokens import Identity
from splitonnx.runtime.limits import Limits
from splitonnx.runtime.wire.buffers import BufferPool

SHORT_ANSWER = 64 << 10
"""Largest HTTP response, in bytes, that must be read within the time limit of the handshake."""
ANSWERS_BYTES = 256 << 20
"""Most bytes of longer responses that are buffered at the same time, for all clients together."""

SCRATCH = 64 << 10
"""Most bytes that are received at a time, but for those of large payloads."""


class Connection(Protocol):
    """The interface through which :class:`Admission` uses a connection."""

    name: str

    @property
    def owner(self) -> str | None:
        """Return the owner of the client's token or certificate, or ``None`` before admission.

        The result is ``""`` if the client was admitted without a token or certificate.
        """

    @property
    def transport(self) -> asyncio.BaseTransport:
        """Return the asyncio transport that carries the connection's bytes."""

    def become_client(self, identity: Identity) -> None:
        """Record the client's identity, and lift the limits on unauthenticated connections."""

    def wait_for_answer(self, size: int) -> None:
        """Allow the client more time to read a long HTTP response, as long as it keeps reading.

        ``size`` is the size of the response in bytes.
        """

    def refuse(self, refusal: Refusal, code: int, reason: str) -> None:
        """Close the connection without waiting; send ``code`` and ``reason`` if possible.

        ``refusal`` is the reason that the server records.
        """


class Admission:
    """Admission control for a server, which decides which connections are accepted.

    ``host`` is the address that the server listens on.  ``has_tls`` means that connections use TLS.
    The other arguments are those of ``serve`` in the module ``websockets`` of this package.
    """

    def __init__(
        self,
        limits: Limits,
        *,
        authorize: Authorize | None,
        respond: Respond | None,
        origins: frozenset[str],
        on_refusal: OnRefusal,
        has_tls: bool,
        has_pages: bool,
        host: str = "",
    ) -> None:
        self.limits = limits
        self.buffers = BufferPool()
        """Memory for received messages, for all clients together."""
        self.scratch = memoryview(bytearray(SCRATCH))
        """Memory for received bytes that are processed at once, for all clients together."""
        # An unfinished TLS handshake takes much memory.  Without TLS, a connection only
        # waits for the event loop to start it, so the quota can allow more connections at a time.
        self.quota = HandshakeQuota(
            limits.unauthenticated if has_tls else limits.unauthenticated + 4 * BACKLOG,
            partial(on_refusal, Refusal.TOO_MANY_UNAUTHENTICATED, "somebody"),
            self._relieve,
        )
        self._has_tls = has_tls
        self.on_refusal = on_refusal
        is_locked = has_tls or authorize is not None
        allowed = Origins(origins, has_pages=has_pages, is_locked=is_locked, host=host)
        self._policy = RequestPolicy(authorize=authorize, respond=respond, origins=allowed)
        self._unauthenticated: dict[Connection, None] = {}  # in the order of arrival
        self._clients: set[Connection] = set()
        self._answers: dict[Connection, int] = {}  # bytes of the longer responses

    def enter(self, connection: Connection) -> None:
        """Add a new connection whose client has not shown a token yet.

        If too many connections without a token are open, the oldest of them is closed.
        """
        if len(self._unauthenticated) >= self.limits.unauthenticated:
            self._send_away(Refusal.TOO_MANY_UNAUTHENTICATED)
        self._unauthenticated[connection] = None

    def _relieve(self) -> None:
        """Close a connection because no file descriptor is left for the next connection."""
        self.on_refusal(Refusal.TOO_MANY_FILES, "somebody")
        if self._unauthenticated:
            self._send_away(Refusal.TOO_MANY_FILES)

    def _send_away(self, refusal: Refusal) -> None:
        """Close the unauthenticated connection that has waited longest."""
        oldest = next(iter(self._unauthenticated))
        del self._unauthenticated[oldest]
        oldest.refuse(refusal, CloseCode.TRY_AGAIN_LATER, "too many wait")
        if self._has_tls:
            self.quota.sweep()

    def admit(self, connection: Connection, identity: Identity) -> Refusal | None:
        """Count a connection as authenticated, unless the limit on clients has been reached.

        Returns:
            ``None`` on success, or the reason for refusal if there are too many clients in total or
            too many clients of this owner.
        """
        if connection.owner is not None:
            return None
        refusal = None
        if len(self._clients) >= self.limits.clients:
            refusal = Refusal.TOO_MANY_CLIENTS
        elif identity.owner and self._count(identity.owner) >= self.limits.clients_per_token:
            refusal = Refusal.TOO_MANY_CLIENTS_OF_TOKEN
        if refusal is not None:
            self.on_refusal(refusal, connection.name)
            return refusal
        self._unauthenticated.pop(connection, None)
        self._clients.add(connection)
        connection.become_client(identity)
        return None

    def _count(self, owner: str) -> int:
        return sum(client.owner == owner for client in self._clients)

    def leave(self, connection: Connection) -> None:
        """Remove a connection that has ended."""
        self._unauthenticated.pop(connection, None)
        self._clients.discard(connection)
        self._answers.pop(connection, None)

    def answer(
        self, connection: Connection, request: Request
    ) -> Response | Awaitable[Response] | None:
        """Return the HTTP response to a request, or ``None`` to open a websocket.

        The response is awaitable if it takes time to make.  If a websocket will be opened and the
        request identifies the client, the client is admitted.
        """
        decision = self._policy.decide(request, connection.transport)
        if decision.refusal is not None:
            self.on_refusal(decision.refusal, connection.name)
        if decision.answer is None:
            identity = decision.identity
            refusal = None if identity is None else self.admit(connection, identity)
            return None if refusal is None else deny_busy(refusal)
        answer, has_body = decision.answer, request.method != "HEAD"
        if isinstance(answer, LaterResponse):
            if not self._keep(connection, answer.most, takes_time=True):
                return self._deny_answer(connection)
            return _make_later(answer, has_body=has_body)
        if has_body and not self._keep(connection, len(answer.body)):
            return self._deny_answer(connection)
        return _make_response(answer, has_body=has_body)

    def _deny_answer(self, connection: Connection) -> Response:
        self.on_refusal(Refusal.TOO_MANY_ANSWERS, connection.name)
        return deny_busy(Refusal.TOO_MANY_ANSWERS)

    def _keep(self, connection: Connection, size: int, *, takes_time: bool = False) -> bool:
        """Allow time to read a long response; return False if too much is buffered already.

        ``takes_time`` means that the response has to be made first, which needs time as well.
        """
        if takes_time or size > SHORT_ANSWER:
            if sum(self._answers.values()) + size > ANSWERS_BYTES:
                return False
            self._answers[connection] = size
            connection.wait_for_answer(size)
        return True


async def _make_later(answer: LaterResponse, *, has_body: bool) -> Response:
    return _make_response(await answer.make(), has_body=has_body)


def _make_response(answer: HttpResponse, *, has_body: bool) -> Response:
    response = make_response(*answer)
    if not has_body:
        response.body = b""
    return response
