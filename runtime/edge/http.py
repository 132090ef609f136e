"""HTTP on the websocket port: requests, responses, and the reasons for refusing a connection.

:mod:`request_policies` decides which response a request gets.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from http import HTTPStatus
from types import MappingProxyType
from typing import NamedTuple, TypeAlias

from websockets.datastructures import Headers
from websockets.http11 import Request, Response

from splitonnx.runtime.edge.tokens import DEFAULT_ROLES, Identity, Role


class Refusal(StrEnum):
    """The reason why a server refused or closed a connection.

    There are only a few reasons, because each one is used as a label value of a metric.
    """

    WRONG_TOKEN = "WrongToken"
    WRONG_ORIGIN = "WrongOrigin"
    WRONG_HOST = "WrongHost"
    TOO_MANY_UNAUTHENTICATED = "TooManyStrangers"
    TOO_MANY_CLIENTS = "TooManyClients"
    TOO_MANY_CLIENTS_OF_TOKEN = "TooManyClientsOfToken"
    TOO_MANY_FILES = "TooManyOpenFiles"
    NO_TOKEN = "NoToken"
    TOO_MANY_ANSWERS = "TooManyAnswers"
    MESSAGE_TOO_BIG = "MessageTooBig"
    MESSAGE_TOO_SLOW = "MessageTooSlow"
    REPLY_TOO_SLOW = "ReplyTooSlow"
    TOO_MANY_FRAGMENTS = "TooManyFragments"
    BROKEN_FRAME = "BrokenFrame"
    HANDSHAKE_TOO_SLOW = "HandshakeTooSlow"
    IDLE = "Idle"
    TLS = "TlsWithoutTls"


STATUSES: Mapping[Refusal, HTTPStatus] = MappingProxyType(
    {
        Refusal.MESSAGE_TOO_BIG: HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE,
        Refusal.HANDSHAKE_TOO_SLOW: HTTPStatus.REQUEST_TIMEOUT,
        Refusal.TLS: HTTPStatus.BAD_REQUEST,
    }
)
"""HTTP statuses for refusals during the handshake; all other refusals get 503 (try again)."""


WHY_BUSY: Mapping[Refusal, str] = MappingProxyType(
    {
        Refusal.TOO_MANY_ANSWERS: "too many ask; try again later",
        Refusal.TOO_MANY_CLIENTS: "too many clients; try again later",
        Refusal.TOO_MANY_CLIENTS_OF_TOKEN: (
            "too many clients of this token's owner; try again later"
        ),
    }
)
"""Texts of the responses to clients that are refused because the server is full."""


@dataclass(frozen=True, kw_only=True)
class HttpRequest:
    """The parts of an HTTP request that determine the response; a missing header is ``""``."""

    path: str
    token: str | None
    """The token in the request, if it is valid."""
    roles: frozenset[Role] = DEFAULT_ROLES
    """The sender's roles; the default ones if no tokens are used."""
    owner: str = ""
    """The owner of the sender's token or certificate, if there is one."""
    is_upgrade: bool = False
    """Whether the request asks for a websocket."""
    encodings: str = ""
    """The ``Accept-Encoding`` header."""
    known_tags: str = ""
    """The ``If-None-Match`` header."""


class HttpResponse(NamedTuple):
    """An HTTP response.

    ``headers`` are sent in addition to the default headers, and override those with the same name.
    """

    status: int
    content_type: str
    body: bytes
    headers: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True)
class LaterResponse:
    """An HTTP response that takes time to make, for example because it is read from disk.

    ``make`` begins to make it, without delaying other clients.  Its body has at most ``most``
    bytes.
    """

    make: Callable[[], Awaitable[HttpResponse]]
    most: int


Authorize: TypeAlias = Callable[[str], Identity | None]
"""Returns the identity that belongs to a token, or ``None`` for an unknown token."""
Respond: TypeAlias = Callable[[HttpRequest], HttpResponse | LaterResponse | None]
"""Returns the response to an HTTP request; ``None`` continues with the websocket handshake."""
OnRefusal: TypeAlias = Callable[[Refusal, str], None]
"""Called with the reason of a refusal and the address of the refused client."""


METHODS = ("GET", "HEAD")
"""The allowed HTTP methods; HTTP requests never change anything on the server."""


def make_response(
    status: int, content_type: str, body: bytes, others: Mapping[str, str] = MappingProxyType({})
) -> Response:
    """Build an HTTP response with default headers.

    ``others`` are headers that are sent in addition to the default headers, and that override those
    with the same name.
    The connection is closed after the response.
    """
    headers = {
        "Content-Type": content_type,
        "Content-Length": str(len(body)),
        "Cache-Control": "no-store",
        "X-Content-Type-Options": "nosniff",
        "Connection": "close",
        **others,
    }
    if status == HTTPStatus.UNAUTHORIZED:
        headers["WWW-Authenticate"] = "Bearer"
    if status == HTTPStatus.SERVICE_UNAVAILABLE:
        headers["Retry-After"] = "1"
    return Response(int(status), HTTPStatus(status).phrase, Headers(headers), body)


def read_request(request: Request, token: str | None, identity: Identity | None) -> HttpRequest:
    """Convert a request from the websockets library to an :class:`HttpRequest`.

    ``token`` is the sender's token, if it is valid, and ``identity`` is the sender's identity, or
    ``None`` if the sender has not identified itself.
    """
    return HttpRequest(
        path=request.path,
        token=token,
        roles=frozenset() if identity is None else identity.roles,
        owner="" if identity is None else identity.owner,
        is_upgrade="Upgrade" in request.headers,
        encodings=",".join(request.headers.get_all("Accept-Encoding")),
        known_tags=",".join(request.headers.get_all("If-None-Match")),
    )


def deny(status: HTTPStatus, sentence: str) -> Response:
    """Build the plain-text response to a refused request; ``sentence`` is its text."""
    return make_response(status, "text/plain; charset=utf-8", f"{sentence}\n".encode())


def deny_busy(refusal: Refusal) -> Response:
    """Build the response to a request that is refused because the server is full."""
    return deny(HTTPStatus.SERVICE_UNAVAILABLE, WHY_BUSY[refusal])


def ask_for(role: Role, request: HttpRequest) -> HttpResponse:
    """Refuse a request without a token, or whose token lacks the required role."""
    status = HTTPStatus.UNAUTHORIZED if request.token is None else HTTPStatus.FORBIDDEN
    return HttpResponse(
        status, "text/plain", f"this takes a token with the role '{role}'\n".encode()
    )
