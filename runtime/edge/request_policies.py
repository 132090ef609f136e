"""Decisions on HTTP requests: which response a request gets, and which identity its sender has.

This module checks methods, hosts, origins and tokens.  :mod:`admissions` limits how many clients
may connect.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from http import HTTPStatus

from websockets.datastructures import MultipleValuesError
from websockets.http11 import Request

from splitonnx.runtime.edge.http import (
    METHODS,
    Authorize,
    HttpResponse,
    LaterResponse,
    Refusal,
    Respond,
    read_request,
)
from splitonnx.runtime.edge.origins import Origins
from splitonnx.runtime.edge.tokens import Identity


@dataclass(frozen=True, kw_only=True)
class Decision:
    """The decision on a request: an HTTP ``answer``, or ``None`` to open a websocket.

    ``identity`` is ``None`` if the client has not identified itself; it may still send a token in a
    message.  ``refusal`` is the reason to report, or ``None`` if nothing needs to be reported.
    """

    identity: Identity | None = None
    answer: HttpResponse | LaterResponse | None = None
    refusal: Refusal | None = None


class RequestPolicy:
    """The rules by which a server accepts or refuses HTTP requests.

    ``authorize`` checks tokens.  Without it, every client is admitted.  A client's owner is then
    the common name in its TLS certificate, or ``""`` if it has no certificate.  ``respond`` builds
    the responses to accepted requests, and ``origins`` are the web origins that may connect.
    """

    def __init__(
        self, *, authorize: Authorize | None, respond: Respond | None, origins: Origins
    ) -> None:
        self._authorize = authorize
        self._respond = respond
        self._origins = origins

    def decide(self, request: Request, transport: asyncio.BaseTransport) -> Decision:
        """Check a request, and return the decision on it.

        ``transport`` carries the connection, and provides the client's TLS certificate.
        """
        if request.method not in METHODS:
            allowed = {"Allow": ", ".join(METHODS)}
            return _deny(HTTPStatus.METHOD_NOT_ALLOWED, "only GET and HEAD are answered", allowed)
        try:
            origin = request.headers.get("Origin")
            authorization = request.headers.get("Authorization")
            host = request.headers.get("Host")
        except MultipleValuesError:
            return _deny(HTTPStatus.BAD_REQUEST, "a header occurs twice")
        if origin is not None and not self._origins.allow(origin, host):
            reason = "pages of this origin may not connect"
            return _deny(HTTPStatus.FORBIDDEN, reason, refusal=Refusal.WRONG_ORIGIN)
        # websockets may use any host name: browsers send an origin with them, which was checked
        if "Upgrade" not in request.headers and not self._origins.answers_to(host):
            reason = "ask by address, or serve with --origin for the name"
            return _deny(HTTPStatus.FORBIDDEN, reason, refusal=Refusal.WRONG_HOST)
        return self._identify(request, authorization, transport)

    def _identify(
        self, request: Request, authorization: str | None, transport: asyncio.BaseTransport
    ) -> Decision:
        token = None
        identity = None if self._authorize else Identity(owner=_read_certificate(transport))
        if authorization is not None and self._authorize is not None:
            scheme, _, token = authorization.partition(" ")
            token = token.strip()
            identity = self._authorize(token) if scheme.lower() == "bearer" else None
            if identity is None:
                reason = "this token is not known here"
                return _deny(HTTPStatus.UNAUTHORIZED, reason, refusal=Refusal.WRONG_TOKEN)
        answer = None
        if self._respond is not None:
            answer = self._respond(read_request(request, token, identity))
        if answer is None and request.method != "GET":
            upgrade = {"Upgrade": "websocket"}
            return _deny(HTTPStatus.UPGRADE_REQUIRED, "only websockets are here", upgrade)
        return Decision(identity=identity, answer=answer)


def _deny(
    status: HTTPStatus,
    sentence: str,
    headers: dict[str, str] | None = None,
    *,
    refusal: Refusal | None = None,
) -> Decision:
    body = f"{sentence}\n".encode()
    answer = HttpResponse(status, "text/plain; charset=utf-8", body, headers or {})
    return Decision(answer=answer, refusal=refusal)


def _read_certificate(transport: asyncio.BaseTransport) -> str:
    """Return the common name in the client's certificate, or ``""`` if it showed none."""
    certificate = transport.get_extra_info("peercert") or {}
    names = dict(pair for group in certificate.get("subject", ()) for pair in group)
    return str(names.get("commonName", ""))
