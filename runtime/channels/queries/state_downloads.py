"""Download the trained state of a session from a server, piece by piece.

The server is not trusted: it sends as many bytes as it has announced, and no others, and the
caller says in advance how many it may announce.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from http import HTTPStatus
from typing import BinaryIO

from splitonnx.errors import ConnectionLost, StateNotFetched, UsageError
from splitonnx.json_errors import JSON_ERRORS
from splitonnx.runtime.channels.credentials import Credentials
from splitonnx.runtime.channels.queries.http_queries import Question, ask, name_peer
from splitonnx.runtime.channels.retries import Backoff
from splitonnx.runtime.wire.saved_states import (
    DESCRIPTION_BYTES,
    NOT_SAVED,
    PIECE_BYTES,
    SAVED_ANEW,
    SavedState,
    StateQuery,
    decode_description,
)

TRIES = 8
"""How often a piece is asked for, if the connection is lost or the server is full."""

_BUSY = (
    None,
    HTTPStatus.REQUEST_TIMEOUT,
    HTTPStatus.BAD_GATEWAY,
    HTTPStatus.SERVICE_UNAVAILABLE,
    HTTPStatus.GATEWAY_TIMEOUT,
)
_KNOWN = {
    NOT_SAVED: "no finished training of this session is saved there for this token's owner; train "
    "to the end with a token that may publish, and fetch with a token of the same owner that has "
    "the role 'fetch'",
    SAVED_ANEW: "the session published a newer state meanwhile; once its training is over, merge "
    "again with the client's folder as it is then",
}


def describe_state(url: str, credentials: Credentials, session: str) -> SavedState:
    """Ask which state of a session is saved on the server at ``url``.

    Raises:
        StateNotFetched: the server has none for the token's owner, or is an earlier version.
        ProtocolError, UsageError: see :func:`http_queries.ask`.
    """
    content = _ask(url, credentials, StateQuery(session=session), DESCRIPTION_BYTES)
    try:
        found = decode_description(content)
    except JSON_ERRORS as error:
        reason = "its answer does not describe a state; it is another program, or another version"
        raise StateNotFetched(name_peer(url), reason) from error
    if found.session != session:
        raise StateNotFetched(name_peer(url), "its answer is about another session")
    return found


def download_state(
    url: str,
    credentials: Credentials,
    state: SavedState,
    file: BinaryIO,
    *,
    most: int,
    wait: Callable[[float], None] = time.sleep,
) -> None:
    """Write the file of a state that :func:`describe_state` returned to ``file``.

    ``most`` is the largest number of bytes that the file may have.  A piece that was lost is asked
    for again, after waiting with ``wait``.

    Raises:
        StateNotFetched: the file is too large, a piece has another size than it should, or the
            state has been replaced meanwhile.
        ProtocolError, UsageError: see :func:`http_queries.ask`.
        OSError: ``file`` cannot be written.
    """
    peer = name_peer(url)
    if state.nbytes > most:
        reason = f"it announces {state.nbytes} bytes, and this bundle's state has at most {most}"
        raise StateNotFetched(peer, reason)
    for offset in range(0, state.nbytes, PIECE_BYTES):
        query = StateQuery(session=state.session, checksum=state.checksum, offset=offset)
        size = min(PIECE_BYTES, state.nbytes - offset)
        piece = _ask_until_answered(url, credentials, query, size, wait)
        if len(piece) != size:
            reason = f"at byte {offset} it sent {len(piece)} bytes in place of {size}"
            raise StateNotFetched(peer, f"{reason}; its answer was cut short")
        file.write(piece)


def _ask_until_answered(
    url: str,
    credentials: Credentials,
    query: StateQuery,
    size: int,
    wait: Callable[[float], None],
) -> bytes:
    delays = Backoff().delays()
    for _ in range(TRIES - 1):
        wait(next(delays))
        try:
            return _ask(url, credentials, query, size)
        except ConnectionLost as error:
            if error.code not in _BUSY:
                raise
    wait(next(delays))
    return _ask(url, credentials, query, size)


def _ask(url: str, credentials: Credentials, query: StateQuery, most: int) -> bytes:
    if credentials.message_bytes < most:
        reason = f"a state comes in answers of up to {PIECE_BYTES} bytes"
        raise UsageError(f"{reason}, over --max-message-bytes {credentials.message_bytes}")
    question = Question(
        path=query.path,
        role="fetch",
        action="fetch the server's part",
        most=most,
        refuse=StateNotFetched,
        known=_KNOWN,
    )
    return ask(url, credentials, question)
