"""The list of a server's sessions over HTTP, and every answer that is not one."""

from __future__ import annotations

import socket
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from splitonnx.errors import (
    ConnectionLost,
    NotPermitted,
    ProtocolError,
    SessionsNotListed,
    Unauthorized,
    UntrustedPeer,
    UsageError,
)
from splitonnx.runtime.channels.credentials import Credentials
from splitonnx.runtime.channels.queries.server_queries import fetch_sessions
from splitonnx.runtime.edge.tokens import Role, Tokens, add_token
from splitonnx.runtime.server.servers import Server
from splitonnx.runtime.wire.session_lists import encode_list
from splitonnx.runtime.wire.tls import make_client_tls, make_server_tls
from tests.support import tiny
from tests.support.certificates import Files
from tests.support.plain_answers import PlainAnswer, answering
from tests.support.session_lists import make_entry, make_list

NOBODY = Credentials()
LIST = make_list(make_entry(), make_entry(owner="\x1b[31m"))


def test_a_list_is_read_and_the_token_shown() -> None:
    with answering(lambda _: PlainAnswer(content=encode_list(LIST))) as (url, asked):
        assert fetch_sessions(url, NOBODY) == LIST
        assert fetch_sessions(f"{url}/lab/", Credentials(token="x" * 43)) == LIST
    assert asked == [("/sessions", None), ("/lab/sessions", f"Bearer {'x' * 43}")]


@pytest.mark.parametrize(
    ("status", "content", "headers", "error", "reason"),
    [
        (426, b"", {}, SessionsNotListed, "HTTP 426; it is of an earlier version, so update it"),
        (404, b"", {}, SessionsNotListed, "HTTP 404"),
        (200, b"<html>", {}, SessionsNotListed, "not such a list"),
        (200, b'{"sessions": 1}', {}, SessionsNotListed, "not such a list"),
        (302, b"", {"Location": "wss://other"}, SessionsNotListed, "'wss://other' (302)"),
        (503, b"too many ask", {}, ConnectionLost, "HTTP 503: too many ask"),
        (403, b"ask by address", {}, Unauthorized, "ask by address"),
        (401, b"a token", {}, Unauthorized, "a token; name its file with --token-file"),
        (200, b"{}", {"Content-Length": "50"}, ConnectionLost, "broke off"),
    ],
)
def test_what_is_not_a_list_is_said(
    status: int,
    content: bytes,
    headers: Mapping[str, str],
    error: type[ProtocolError],
    reason: str,
) -> None:
    answer = PlainAnswer(content=content, status=status, headers=headers)
    with answering(lambda _: answer) as (url, _), pytest.raises(error) as raised:
        fetch_sessions(url, NOBODY)
    assert reason in str(raised.value)


def test_an_answer_beyond_the_limit_is_not_read() -> None:
    content = encode_list(LIST)
    with answering(lambda _: PlainAnswer(content=content)) as (url, _):
        exact = Credentials(message_bytes=len(content))
        assert fetch_sessions(url, exact) == LIST
        fewer = replace(exact, message_bytes=len(content) - 1)
        with pytest.raises(SessionsNotListed, match="--max-message-bytes"):
            fetch_sessions(url, fewer)


def test_where_no_server_is_the_connection_is_lost() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(ConnectionLost, match="refused"):
        fetch_sessions(f"ws://127.0.0.1:{port}", NOBODY)


@pytest.mark.parametrize("url", ["http://127.0.0.1:1", "127.0.0.1:1", "ws://", "ws://a:b@c:1"])
def test_other_addresses_are_refused(url: str) -> None:
    with pytest.raises(UsageError):
        fetch_sessions(url, NOBODY)


def test_an_operator_s_token_is_taken_and_no_other(tmp_path: Path) -> None:
    tokens = {role: add_token(tmp_path / "tokens", role, [role]) for role in Role}
    server = tiny.split_bundle().server
    assert server is not None
    with Server(server, port=0, tokens=Tokens.read(tmp_path / "tokens"), isolate=False) as running:
        found = fetch_sessions(running.url, Credentials(token=tokens[Role.OPERATE]))
        assert (found.policy, found.sessions) == ("per-client", ())
        for role in (Role.TRAIN, Role.PUBLISH):
            with pytest.raises(NotPermitted, match="lacks the role 'operate'"):
                fetch_sessions(running.url, Credentials(token=tokens[role]))
        with pytest.raises(Unauthorized, match="--token-file"):
            fetch_sessions(running.url, NOBODY)
        with pytest.raises(Unauthorized, match="not known here"):
            fetch_sessions(running.url, Credentials(token="x" * 43))


def test_a_server_of_an_earlier_version_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    server = tiny.split_bundle().server
    assert server is not None
    with Server(server, port=0) as running:
        monkeypatch.delitem(running._responder._operations, "/sessions")
        with pytest.raises(SessionsNotListed, match="earlier version"):
            fetch_sessions(running.url, NOBODY)


def test_certificates_are_checked_on_both_sides(tmp_path: Path) -> None:
    files = Files(tmp_path)
    server = tiny.split_bundle().server
    assert server is not None
    tls = make_server_tls(*files.server, client_authority=files.authority)
    own = dict(zip(("certificate", "key"), files.client, strict=True))
    with Server(server, port=0, tls=tls, isolate=False) as running:
        ours = make_client_tls(authority=files.authority, **own)
        assert fetch_sessions(running.url, Credentials(tls=ours)).sessions == ()
        for authority, shown, error in (
            (files.other_authority, own, UntrustedPeer),
            (files.authority, {}, ProtocolError),
        ):
            theirs = Credentials(tls=make_client_tls(authority=authority, **shown))
            with pytest.raises(error) as raised:
                fetch_sessions(running.url, theirs)
            assert shown or "--cert" in str(raised.value)
        with pytest.raises(ConnectionLost, match="it may want TLS"):
            fetch_sessions(running.url.replace("wss", "ws"), NOBODY)
        with pytest.raises(UsageError, match="without TLS"):
            fetch_sessions(running.url.replace("wss", "ws"), Credentials(tls=ours))
