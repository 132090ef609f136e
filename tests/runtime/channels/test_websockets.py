"""A client's websocket: what its server's answers, silences and ends come to."""

from __future__ import annotations

import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from splitonnx.errors import (
    ConnectionLost,
    MessageTooLarge,
    ProtocolError,
    Unauthorized,
    UsageError,
)
from splitonnx.interrupts import noting_interrupts
from splitonnx.runtime.channels.credentials import Credentials
from splitonnx.runtime.channels.websockets import WebSocketTransport, connect
from splitonnx.runtime.limits import Limits
from tests.support.echoes import Echo, trickle
from tests.support.interrupts import lose_interrupt, taking_interrupts
from tests.support.pretenders import accept, pretending

ATTEMPTS = 60
"""The error that came through was one of timing, in one attempt of ten."""


@contextmanager
def listening(answer: bytes, *, reset: bool) -> Iterator[str]:
    """Hang up on every caller, in the middle of an answer, while the context lasts."""
    over = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def hang_up() -> None:
            while not over.is_set():
                caller, _ = listener.accept()
                if reset:
                    linger = struct.pack("ii", 1, 0)
                    caller.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                if not over.is_set():
                    caller.sendall(answer)
                caller.close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        try:
            yield f"ws://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            over.set()
            socket.create_connection(listener.getsockname()).close()  # the last caller
            thread.join()


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 101 Sw"])
@pytest.mark.parametrize("reset", [False, True])
def test_a_server_that_hangs_up_in_the_handshake_is_a_lost_connection(
    answer: bytes, reset: bool
) -> None:
    with listening(answer, reset=reset) as url:
        for _ in range(ATTEMPTS):
            with pytest.raises(ConnectionLost):
                connect(url)


SESAME = Credentials(token="open sesame")


def ask(transport: WebSocketTransport, *chunks: bytes) -> bytes:
    transport.send(chunks)
    return bytes(transport.receive())


def test_a_reply_that_does_not_begin_is_a_lost_connection() -> None:
    def be_silent(connection: socket.socket) -> None:
        accept(connection)
        connection.recv(1)  # until the client has had enough

    with pretending(be_silent) as url:
        transport = WebSocketTransport(url, reply_seconds=0.1)
        with pytest.raises(ConnectionLost, match=r"no reply within 0\.1 s"):
            transport.receive()
        transport.close()


def test_an_interrupt_whose_exception_was_discarded_ends_the_wait_for_a_reply() -> None:
    def be_silent(connection: socket.socket) -> None:
        accept(connection)
        connection.recv(1)

    with pretending(be_silent) as url, taking_interrupts(), noting_interrupts():
        transport = WebSocketTransport(url, message_seconds=0.04)
        lose_interrupt()
        with pytest.raises(KeyboardInterrupt):
            transport.receive()
        transport.close()


def test_an_interrupt_whose_exception_was_discarded_ends_the_attempts_to_connect() -> None:
    with taking_interrupts(), noting_interrupts():
        lose_interrupt()
        with pytest.raises(KeyboardInterrupt):
            connect("ws://127.0.0.1:1")


@pytest.mark.parametrize(
    "content",
    [b"\x82\x7f" + (1 << 20).to_bytes(8, "big") + bytes(1 << 20), b"\x02\x00" + b"\x00\x00" * 5000],
    ids=["within a frame", "by fragments"],
)
def test_a_reply_that_trickles_is_a_lost_connection(content: bytes) -> None:
    def dribble(connection: socket.socket) -> None:
        accept(connection)
        trickle(connection, content)

    with pretending(dribble) as url:
        transport = WebSocketTransport(url, reply_seconds=30, message_seconds=0.2)
        with pytest.raises(ConnectionLost, match=r"a reply took longer than 0\.2 s"):
            transport.receive()
        transport.close()


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        (b"", ConnectionLost),
        (b"\x00\xff garbage\r\n\r\n", ConnectionLost),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nhey", ConnectionLost),
        (b"HTTP/1.1 500 \x1b[31m\r\nContent-Length: 0\r\n\r\n", ConnectionLost),
        (b"HTTP/1.1 401 Unauthorized\r\nContent-Length: 4\r\n\r\nno!\n", Unauthorized),
        (b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\n\r\n", Unauthorized),
    ],
)
def test_what_answers_no_websocket_is_told(answer: bytes, expected: type[ProtocolError]) -> None:
    def respond(connection: socket.socket) -> None:
        connection.recv(1 << 16)
        connection.sendall(answer)

    with pretending(respond) as url, pytest.raises(expected) as caught:
        connect(url, credentials=SESAME)
    assert str(caught.value).isprintable()
    assert "sesame" not in str(caught.value)


def test_a_client_s_own_limit_holds_for_what_the_server_sends() -> None:
    credentials = Credentials(message_bytes=1000)
    with Echo() as echo:
        transport = connect(echo.url, credentials=credentials)
        assert ask(transport, bytes(1000)) == bytes(1000)
        with pytest.raises(MessageTooLarge, match="--max-message-bytes"):
            ask(transport, bytes(1001))
        transport.close()
    with pytest.raises(UsageError, match="must be positive"):
        Credentials(message_bytes=0)


def test_a_message_over_the_server_s_limit_is_not_tried_again() -> None:
    with Echo(limits=Limits(message_bytes=1 << 20)) as echo:
        transport = connect(echo.url)
        with pytest.raises(MessageTooLarge, match="--max-message-bytes"):
            ask(transport, bytes(3 << 20))
        transport.close()


def test_a_reply_over_the_client_s_limit_is_not_waited_for_again() -> None:
    def boast(connection: socket.socket) -> None:
        accept(connection)
        connection.sendall(b"\x82\x7f" + (257 << 20).to_bytes(8, "big"))
        connection.recv(1)

    with pretending(boast) as url:
        transport = connect(url)
        with pytest.raises(MessageTooLarge, match="sent a message larger"):
            transport.receive()
        transport.close()


def test_a_server_that_stays_after_a_reply_that_is_too_large_is_left() -> None:
    def boast(connection: socket.socket) -> None:
        accept(connection)
        connection.sendall(b"\x82\x7f" + (257 << 20).to_bytes(8, "big"))
        while connection.recv(1 << 16):  # it does not close its side
            continue

    with pretending(boast) as url:
        transport = WebSocketTransport(url, message_seconds=0.4)
        with pytest.raises(MessageTooLarge, match="sent a message larger"):
            transport.receive()
        transport.close()


def test_an_address_that_is_none_is_refused() -> None:
    with pytest.raises(UsageError, match="not a websocket address"):
        connect("http://127.0.0.1:1")
