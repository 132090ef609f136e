"""One question to a server over plain HTTP, with the client's credentials.

The server is not trusted: its answer is bounded in size and time, redirects are not followed, and
texts in it may contain any characters.
"""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException, HTTPResponse
from urllib.parse import SplitResult, urlsplit

from splitonnx.errors import (
    ConnectionLost,
    NotPermitted,
    ProtocolError,
    Unauthorized,
    UntrustedPeer,
    UsageError,
)
from splitonnx.runtime.channels.credentials import Credentials, check_url
from splitonnx.runtime.channels.websockets import MESSAGE_SECONDS, OPEN_SECONDS
from splitonnx.runtime.wire.tls import describe_failure, make_client_tls

_PORTS = {"ws": 80, "wss": 443}
_PIECE = 1 << 16
_SAID = 200
"""Bytes of a refusal that are shown."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question to a server, and what it means if there is no answer.

    ``path`` is the URL path.  ``role`` is the role that it takes, and ``action`` says what for.  An
    answer has at most ``most`` bytes, and ``beyond`` says what to do if it has more.  ``refuse``
    makes the error for what is not an answer, of the server's name and the reason.  ``known`` maps
    the texts of the server's refusals to such reasons.
    """

    path: str
    role: str
    action: str
    most: int
    refuse: Callable[[str, str], ProtocolError]
    beyond: str = "it is another program, or another version"
    known: Mapping[str, str] = field(default_factory=dict)


def name_peer(url: str) -> str:
    """Return the address as messages name it."""
    return url.partition("?")[0]


def ask(url: str, credentials: Credentials, question: Question) -> bytes:
    """Return the answer of the server at ``url``, such as ``ws://127.0.0.1:8765``.

    Raises:
        UsageError: ``url`` is not a websocket address, or does not match the credentials.
        ConnectionLost: no server answers, or it is full; trying again may help.
        Unauthorized: the server requires a token, or rejects this one.
        NotPermitted: the token lacks the role.
        UntrustedPeer: one side does not trust the other's certificate.
        ProtocolError: what ``question.refuse`` makes; there is no answer, or a redirect.
    """
    check_url(url, credentials)
    peer, parts = name_peer(url), urlsplit(url)
    if parts.scheme not in _PORTS or not parts.hostname:
        raise UsageError(f"'{peer}' is not a websocket address such as ws://host:8765")
    port = parts.port or _PORTS[parts.scheme]
    path = parts.path.rstrip("/") + question.path  # a proxy may have it below another
    headers = {} if credentials.token is None else {"Authorization": f"Bearer {credentials.token}"}
    connection = HTTPConnection(parts.hostname, port)
    try:
        with (
            socket.create_connection((parts.hostname, port), OPEN_SECONDS) as plain,
            _limiting(plain, peer),
        ):
            connection.sock = _secure(plain, parts, credentials)
            connection.request("GET", path, headers=headers)
            with connection.getresponse() as response:
                if response.status != HTTPStatus.OK:
                    raise _translate_status(peer, response, credentials, question)
                return _read(response, peer, question)
    except (OSError, HTTPException) as error:
        raise _translate(peer, error) from error
    finally:
        connection.close()


def _secure(plain: socket.socket, parts: SplitResult, credentials: Credentials) -> socket.socket:
    """Do the TLS handshake on a connection, if the address wants one."""
    if parts.scheme == "ws":
        return plain
    tls = make_client_tls() if credentials.tls is None else credentials.tls
    return tls.wrap_socket(plain, server_hostname=parts.hostname)


@contextmanager
def _limiting(plain: socket.socket, peer: str) -> Iterator[None]:
    """End a connection if its answer takes too long, however slowly its bytes arrive.

    Raises:
        ConnectionLost: it took too long.
    """
    is_over = threading.Event()
    same = plain.dup()  # TLS takes the other one over

    def end() -> None:
        is_over.set()
        with suppress(OSError):  # it has ended meanwhile
            same.shutdown(socket.SHUT_RDWR)

    timer = threading.Timer(MESSAGE_SECONDS, end)
    timer.daemon = True
    timer.start()
    error: Exception | None = None
    try:
        yield
    except (OSError, HTTPException, ConnectionLost) as raised:
        error = raised
    finally:
        timer.cancel()
        same.close()
    if is_over.is_set():  # an answer without a length seems to be complete
        reason = f"its answer took longer than {MESSAGE_SECONDS:g} s"
        raise ConnectionLost(peer, reason) from error
    if error is not None:
        raise error


def _read(response: HTTPResponse, peer: str, question: Question) -> bytes:
    """Read an answer of limited size."""
    content = bytearray()
    while piece := response.read1(_PIECE):
        content += piece
        if len(content) > question.most:
            reason = f"its answer has over {question.most} bytes; {question.beyond}"
            raise question.refuse(peer, reason)
    if response.length:
        raise ConnectionLost(peer, "its answer broke off")
    return bytes(content)


def _translate_status(
    peer: str, response: HTTPResponse, credentials: Credentials, question: Question
) -> ProtocolError:
    said = " ".join(response.read1(_SAID).decode("utf-8", "replace").split()) or response.reason
    if (reason := question.known.get(said)) is not None:
        return question.refuse(peer, reason)
    match response.status:
        case HTTPStatus.FORBIDDEN if credentials.token is not None and f"'{question.role}'" in said:
            return NotPermitted(question.role, question.action)
        case HTTPStatus.UNAUTHORIZED if credentials.token is None:
            said += "; name its file with --token-file"
            return Unauthorized(peer, response.status, said)
        case HTTPStatus.UNAUTHORIZED | HTTPStatus.FORBIDDEN:
            return Unauthorized(peer, response.status, said)
        case HTTPStatus.NOT_FOUND | HTTPStatus.UPGRADE_REQUIRED:
            reason = f"it answers HTTP {response.status}; it is of an earlier version, so update it"
            return question.refuse(peer, f"{reason}, or it is another program")
        case status if 300 <= status < 400:
            target = response.headers.get("Location", "")[:_SAID]
            reason = f"it answers with a redirect to '{target}' ({status}), which is not followed"
            return question.refuse(peer, f"{reason}; name that server if it is the right one")
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
