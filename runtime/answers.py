"""HTTP on the websockets' port: what a request asks, and the answer that ends its connection.

Who may have which answer is not known here.
"""

from __future__ import annotations

from collections.abc import Mapping
from http import HTTPStatus
from types import MappingProxyType

from websockets.datastructures import Headers
from websockets.http11 import Request, Response

from splitonnx.runtime.identities import Role
from splitonnx.runtime.refusals import WHY_BUSY, Refusal, Visit

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


def read_visit(request: Request, token: str | None, roles: frozenset[Role]) -> Visit:
    """Read what those are asked about who answer."""
    return Visit(
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
