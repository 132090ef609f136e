"""Ask a server for the list of its sessions, over plain HTTP on its websocket port.

The server is not trusted: its answer is bounded in size and time, redirects are not followed, and
names in it may contain any characters.
"""

from __future__ import annotations

import ssl
import time
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException, HTTPResponse, HTTPSConnection
from urllib.parse import urlsplit

from splitonnx.errors import (
    ConnectionLost,
    NotPermitted,
    ProtocolError,
    SessionsNotListed,
    Unauthorized,
    UntrustedPeer,
    UsageError,
)
from splitonnx.json_errors import JSON_ERRORS
from splitonnx.runtime.channels.credentials import Credentials, check_url
from splitonnx.runtime.channels.websockets import MESSAGE_SECONDS, OPEN_SECONDS
from splitonnx.runtime.wire.session_lists import PATH, SessionList, decode_list
from splitonnx.runtime.wire.tls import describe_failure, make_client_tls

_SCHEMES = ("ws", "wss")
_ROLE = "operate"
_PIECE = 1 << 16
_SAID = 200
"""Bytes of a refusal that are shown."""


def fetch_sessions(url: str, credentials: Credentials) -> SessionList:
    """Return the sessions of the server at ``url``, such as ``ws://127.0.0.1:8765``.

    Raises:
        UsageError: ``url`` is not a websocket address, or does not match the credentials.
        ConnectionLost: no server answers, or it is full; trying again may help.
        Unauthorized: the server requires a token, or rejects this one.
        NotPermitted: the token lacks the role ``operate``.
        UntrustedPeer: one side does not trust the other's certificate.
        SessionsNotListed: the answer is not a list of sessions, or a redirect; the server may be
            an earlier version.
    """
    check_url(url, credentials)
    peer = url.partition("?")[0]
    connection = _prepare(url, peer, credentials)
    headers = {} if credentials.token is None else {"Authorization": f"Bearer {credentials.token}"}
    try:
        path = urlsplit(url).path.rstrip("/") + PATH  # a proxy may have it below another path
        connection.request("GET", path, headers=headers)
        with connection.getresponse() as response:
            if response.status != HTTPStatus.OK:
                raise _translate_status(peer, response, credentials)
            content = _read(response, peer, credentials.message_bytes)
    except (OSError, HTTPException) as error:
        raise _translate(peer, error) from error
    finally:
        connection.close()
    try:
        return decode_list(content)
    except JSON_ERRORS as error:
        reason = "its answer is not such a list; it is another program, or another version"
        raise SessionsNotListed(peer, reason) from error


def _prepare(url: str, peer: str, credentials: Credentials) -> HTTPConnection:
    parts = urlsplit(url)
    if parts.scheme not in _SCHEMES or not parts.hostname:
        raise UsageError(f"'{peer}' is not a websocket address such as ws://host:8765")
    if parts.scheme == "ws":
        return HTTPConnection(parts.hostname, parts.port, timeout=OPEN_SECONDS)
    tls = make_client_tls() if credentials.tls is None else credentials.tls
    return HTTPSConnection(parts.hostname, parts.port, timeout=OPEN_SECONDS, context=tls)


def _read(response: HTTPResponse, peer: str, most: int) -> bytes:
    """Read an answer of at most ``most`` bytes, which has to be complete after some time."""
    content, end_by = bytearray(), time.monotonic() + MESSAGE_SECONDS
    while piece := response.read1(_PIECE):
        content += piece
        if len(content) > most:
            reason = f"its answer has over {most} bytes; take more with --max-message-bytes"
            raise SessionsNotListed(peer, reason)
        if time.monotonic() > end_by:
            raise ConnectionLost(peer, f"its answer took longer than {MESSAGE_SECONDS:g} s")
    if response.length:
        raise ConnectionLost(peer, "its answer broke off")
    return bytes(content)


def _translate_status(peer: str, response: HTTPResponse, credentials: Credentials) -> ProtocolError:
    said = " ".join(response.read1(_SAID).decode("utf-8", "replace").split()) or response.reason
    match response.status:
        case HTTPStatus.FORBIDDEN if credentials.token is not None and f"'{_ROLE}'" in said:
            return NotPermitted(_ROLE, "list the sessions")
        case HTTPStatus.UNAUTHORIZED if credentials.token is None:
            said += "; name its file with --token-file"
            return Unauthorized(peer, response.status, said)
        case HTTPStatus.UNAUTHORIZED | HTTPStatus.FORBIDDEN:
            return Unauthorized(peer, response.status, said)
        case HTTPStatus.NOT_FOUND | HTTPStatus.UPGRADE_REQUIRED:
            reason = f"it answers HTTP {response.status}; it is of an earlier version, so update it"
            return SessionsNotListed(peer, f"{reason}, or it is another program")
        case status if 300 <= status < 400:
            target = response.headers.get("Location", "")[:_SAID]
            reason = f"it answers with a redirect to '{target}' ({status}), which is not followed"
            return SessionsNotListed(peer, f"{reason}; name that server if it is the right one")
    return ConnectionLost(peer, f"HTTP {response.status}: {said}", response.status)


def _translate(peer: str, error: Exception) -> ProtocolError:
    failure = describe_failure(error) if isinstance(error, ssl.SSLError) else None
    if failure is not None:
        return UntrustedPeer(peer, failure)
    lost = ConnectionLost(peer, " ".join(str(error).split()) or type(error).__name__)
    cut = ssl.SSLError | HTTPException | ConnectionResetError | BrokenPipeError
    if isinstance(error, cut):
        is_safe = peer.startswith("wss:")
        hint = "want a certificate of this side (--cert, --key)" if is_safe else "want TLS (wss://)"
        lost.reason += f"; it may {hint}"
    return lost
