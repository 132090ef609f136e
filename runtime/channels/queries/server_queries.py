"""Ask a server for the list of its sessions."""

from __future__ import annotations

from splitonnx.errors import SessionsNotListed
from splitonnx.json_errors import JSON_ERRORS
from splitonnx.runtime.channels.credentials import Credentials
from splitonnx.runtime.channels.queries.http_queries import Question, ask, name_peer
from splitonnx.runtime.wire.session_lists import PATH, SessionList, decode_list


def fetch_sessions(url: str, credentials: Credentials) -> SessionList:
    """Return the sessions of the server at ``url``, such as ``ws://127.0.0.1:8765``.

    Names in the list may contain any characters.

    Raises:
        UsageError: ``url`` is not a websocket address, or does not match the credentials.
        ConnectionLost: no server answers, or it is full; trying again may help.
        Unauthorized: the server requires a token, or rejects this one.
        NotPermitted: the token lacks the role ``operate``.
        UntrustedPeer: one side does not trust the other's certificate.
        SessionsNotListed: the answer is not a list of sessions, or a redirect; the server may be
            an earlier version.
    """
    question = Question(
        path=PATH,
        role="operate",
        action="list the sessions",
        most=credentials.message_bytes,
        refuse=SessionsNotListed,
        beyond="take more with --max-message-bytes",
    )
    content = ask(url, credentials, question)
    try:
        return decode_list(content)
    except JSON_ERRORS as error:
        reason = "its answer is not such a list; it is another program, or another version"
        raise SessionsNotListed(name_peer(url), reason) from error
