"""HTTP on the websockets' port: requests, responses, and why a connection is refused.

Who may have which response is not known here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from http import HTTPStatus
from types import MappingProxyType
from typing import NamedTuple, TypeAlias

from websockets.datastructures import Headers
from websockets.http11 import Request, Response

from splitonnx.runtime.edge.tokens import ALL_ROLES, Identity, Role


class Refusal(StrEnum):
    """Why a connection was refused or ended here; few, so that they may label a metric."""

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
"""What is said in HTTP before there is a websocket; 503 for all others: come again."""


WHY_BUSY: Mapping[Refusal, str] = MappingProxyType(
    {
        Refusal.TOO_MANY_ANSWERS: "too many ask; try again later",
        Refusal.TOO_MANY_CLIENTS: "too many clients; try again later",
        Refusal.TOO_MANY_CLIENTS_OF_TOKEN: (
            "too many clients of this token's owner; try again later"
        ),
    }
)
"""What somebody is told for whom there is no room now."""


@dataclass(frozen=True, kw_only=True)
class HttpRequest:
    """An HTTP request, as far as answers hang on it; headers that it lacks are ``""``."""

    path: str
    token: str | None
    """The token shown, which is a valid one."""
    roles: frozenset[Role] = ALL_ROLES
    """What whoever asks may do: everything where no tokens are used."""
    is_upgrade: bool = False
    """Return whether it asks for a websocket."""
    encodings: str = ""
    """``Accept-Encoding``."""
    known_tags: str = ""
    """``If-None-Match``."""


class HttpResponse(NamedTuple):
    """An HTTP answer; ``headers`` are sent beside, or in place of, those that every answer has."""

    status: int
    content_type: str
    body: bytes
    headers: Mapping[str, str] = MappingProxyType({})


Authorize: TypeAlias = Callable[[str], Identity | None]
"""From a token to whom it stands for, if it is known."""
Respond: TypeAlias = Callable[[HttpRequest], HttpResponse | None]
"""From an HTTP request to an answer; ``None`` leads to the websocket handshake."""
OnRefusal: TypeAlias = Callable[[Refusal, str], None]
"""Told why and whom."""


METHODS = ("GET", "HEAD")
"""What is answered; nothing that a server holds is changed by HTTP."""


def make_response(
    status: int, content_type: str, body: bytes, others: Mapping[str, str] = MappingProxyType({})
) -> Response:
    """Make an HTTP answer, after which the connection is closed."""
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


def read_request(request: Request, token: str | None, roles: frozenset[Role]) -> HttpRequest:
    """Read what those are asked about who answer."""
    return HttpRequest(
        path=request.path,
        token=token,
        roles=roles,
        is_upgrade="Upgrade" in request.headers,
        encodings=",".join(request.headers.get_all("Accept-Encoding")),
        known_tags=",".join(request.headers.get_all("If-None-Match")),
    )


def deny(status: HTTPStatus, sentence: str) -> Response:
    """Make the answer to a request that is refused: a sentence, which says why."""
    return make_response(status, "text/plain; charset=utf-8", f"{sentence}\n".encode())


def deny_busy(refusal: Refusal) -> Response:
    """Make the answer to a request for which there is no room now."""
    return deny(HTTPStatus.SERVICE_UNAVAILABLE, WHY_BUSY[refusal])
