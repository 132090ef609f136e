"""One question over plain HTTP: what is asked, and what an answer may not do."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest

from splitonnx.errors import ConnectionLost, NotPermitted, SessionsNotListed, UsageError
from splitonnx.runtime.channels.credentials import Credentials
from splitonnx.runtime.channels.queries import http_queries
from splitonnx.runtime.channels.queries.http_queries import Question, ask, name_peer
from tests.support.plain_answers import PlainAnswer, answering

NOBODY = Credentials()
SOMEBODY = Credentials(token="x" * 43)
QUESTION = Question(
    path="/colour",
    role="paint",
    action="learn the colour",
    most=4,
    refuse=SessionsNotListed,
    known={"it is secret": "ask the painter"},
)


def test_the_answer_is_returned_and_the_token_was_shown() -> None:
    with answering(lambda _: PlainAnswer(content=b"blue")) as (url, asked):
        assert ask(url, NOBODY, QUESTION) == b"blue"
        assert ask(f"{url}/lab/", SOMEBODY, QUESTION) == b"blue"
    assert asked == [("/colour", None), ("/lab/colour", f"Bearer {'x' * 43}")]


def test_an_answer_beyond_the_limit_is_refused_with_what_to_do() -> None:
    question = replace(QUESTION, beyond="ask for less")
    with (
        answering(lambda _: PlainAnswer(content=b"green")) as (url, _),
        pytest.raises(SessionsNotListed, match="over 4 bytes; ask for less"),
    ):
        ask(url, NOBODY, question)


def test_a_redirect_is_not_followed() -> None:
    with answering(lambda _: PlainAnswer(content=b"grey")) as (elsewhere, asked):
        there = {"Location": elsewhere.replace("ws", "http")}
        moved = PlainAnswer(content=b"", status=307, headers=there)
        with (
            answering(lambda _: moved) as (url, _),
            pytest.raises(SessionsNotListed, match=r"redirect to .* which is not followed"),
        ):
            ask(url, SOMEBODY, QUESTION)
        assert asked == []


@pytest.mark.parametrize("status", [403, 404, 410, 500])
def test_a_refusal_that_is_known_has_a_reason_of_its_own(status: int) -> None:
    secret = PlainAnswer(content=b"it is secret\n", status=status)
    with (
        answering(lambda _: secret) as (url, _),
        pytest.raises(SessionsNotListed, match="ask the painter"),
    ):
        ask(url, NOBODY, QUESTION)


def test_a_role_that_the_token_lacks_is_named() -> None:
    refused = PlainAnswer(content=b"this takes a token with the role 'paint'\n", status=403)
    with (
        answering(lambda _: refused) as (url, _),
        pytest.raises(NotPermitted, match="may not learn the colour: it lacks the role 'paint'"),
    ):
        ask(url, SOMEBODY, QUESTION)


@contextmanager
def stopping_after(begin: bytes) -> Iterator[str]:
    """Accept a connection, send the beginning of an answer, and then nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(60.0)
        accepted: list[socket.socket] = []

        def accept() -> None:
            connection, _ = listener.accept()
            accepted.append(connection)
            connection.sendall(begin)

        thread = threading.Thread(target=accept)
        thread.start()
        try:
            yield f"ws://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            thread.join()
            accepted[0].close()


@pytest.mark.parametrize(
    "begin",
    [
        b"HTTP/1.1 200",
        b"HTTP/1.1 200 OK\r\nX-Long: a",
        b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nbl",
        b"HTTP/1.1 200 OK\r\n\r\nblue",
        b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nbl\r\n",
        b"HTTP/1.1 500 Sorry\r\nContent-Length: 4\r\n\r\n",
    ],
    ids=["status", "header", "body", "body without a length", "chunks", "refusal"],
)
def test_an_answer_that_does_not_end_is_ended(
    monkeypatch: pytest.MonkeyPatch, begin: bytes
) -> None:
    monkeypatch.setattr(http_queries, "MESSAGE_SECONDS", 0.1)
    with stopping_after(begin) as url, pytest.raises(ConnectionLost, match=r"longer than 0\.1 s"):
        ask(url, NOBODY, QUESTION)


def test_a_tls_handshake_that_does_not_end_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http_queries, "MESSAGE_SECONDS", 0.1)
    with (
        stopping_after(b"\x16\x03\x03\x00\x7a\x02") as url,
        pytest.raises(ConnectionLost, match=r"longer than 0\.1 s"),
    ):
        ask(url.replace("ws:", "wss:"), NOBODY, QUESTION)


def test_a_peer_is_named_without_what_may_be_secret() -> None:
    assert name_peer("ws://lab:8765/path?token=1") == "ws://lab:8765/path"
    with pytest.raises(UsageError, match="is not a websocket address"):
        ask("http://lab", NOBODY, QUESTION)
