"""Websockets from both ends: what is carried, and what is refused at which limit."""

from __future__ import annotations

import base64
import hashlib
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest

from splitonnx.errors import (
    ConnectionLost,
    MessageTooLarge,
    PortInUse,
    ProtocolError,
    Redirected,
    Unauthorized,
    UsageError,
)
from splitonnx.runtime.channels import bounded_connections
from splitonnx.runtime.channels.credentials import Credentials
from splitonnx.runtime.channels.websockets import WebSocketTransport, connect
from splitonnx.runtime.edge import connections
from splitonnx.runtime.edge.connections import MAX_FRAGMENTS
from splitonnx.runtime.edge.http import Refusal
from splitonnx.runtime.edge.listeners import HandshakeQuota, open_listeners
from splitonnx.runtime.limits import Limits
from splitonnx.runtime.wire.close_codes import BUSY, RESTART
from splitonnx.runtime.wire.fragments import FRAGMENT
from tests.support.echoes import (
    BINARY,
    CONT,
    FIN,
    PATIENCE,
    PING,
    Echo,
    dial,
    frame,
    know_sesame,
    read_close,
    read_to_end,
    shake,
    trickle,
    upgrade,
)

pytestmark = pytest.mark.alone

SESAME = Credentials(token="open sesame")
HASTY = Limits(handshake_seconds=0.2, login_seconds=0.2, message_seconds=0.2, idle_seconds=0.3)


def ask(transport: WebSocketTransport, *chunks: bytes) -> bytes:
    transport.send(chunks)
    return transport.receive()


@pytest.mark.parametrize("size", [0, 1, FRAGMENT - 1, FRAGMENT, FRAGMENT + 1, 5 * FRAGMENT + 3])
def test_a_message_of_any_size_arrives_whole(size: int) -> None:
    content = bytes(range(256)) * (size // 256) + bytes(size % 256)
    with Echo() as echo:
        transport = connect(echo.url)
        assert ask(transport, content) == content
        assert ask(transport, content, b"and more") == content + b"and more"
        transport.close()
    assert transport.bytes_sent == transport.bytes_received == 2 * size + 8


def test_a_token_in_the_header_lets_in() -> None:
    with Echo(authorize=know_sesame) as echo:
        transport = connect(echo.url, credentials=SESAME)
        assert ask(transport, bytes(20 << 10)) == bytes(20 << 10)  # more than a stranger may
        transport.close()


def test_a_wrong_token_in_the_header_is_refused_for_good() -> None:
    with Echo(authorize=know_sesame) as echo:
        with pytest.raises(Unauthorized, match="not known here") as caught:
            connect(echo.url, credentials=Credentials(token="open barley"))
        assert caught.value.status == 401
        echo.expect(Refusal.WRONG_TOKEN)


@pytest.mark.parametrize("header", ["Basic b3BlbiBzZXNhbWU=", "open sesame", "Bearer", ""])
def test_other_ways_to_authorize_are_refused(header: str) -> None:
    with Echo(authorize=know_sesame) as echo, dial(echo.port) as connection:
        assert b" 401 " in shake(connection, f"Authorization: {header}")


def test_a_token_may_come_as_the_first_message() -> None:
    with Echo(authorize=know_sesame) as echo:
        transport = connect(echo.url)
        assert ask(transport, b"open sesame") == b"welcome, ali"
        assert ask(transport, bytes(20 << 10)) == bytes(20 << 10)
        transport.close()


def test_a_wrong_token_as_the_first_message_is_refused_for_good() -> None:
    with Echo(authorize=know_sesame) as echo:
        transport = connect(echo.url)
        transport.send([b"open barley"])
        with pytest.raises(Unauthorized, match="unknown token"):
            transport.receive()


def test_a_stranger_may_not_send_more_than_a_token() -> None:
    limits = Limits(unauthenticated_bytes=1000)
    with Echo(authorize=know_sesame, limits=limits) as echo, dial(echo.port) as connection:
        shake(connection)
        connection.sendall(frame(b"", length=1001))  # the announcement is enough
        assert read_close(connection) == 1009
        echo.expect(Refusal.MESSAGE_TOO_BIG)


def test_a_stranger_may_not_send_many_small_messages_instead() -> None:
    with Echo(authorize=know_sesame) as echo, dial(echo.port) as connection:
        shake(connection)
        connection.sendall(frame(bytes(100), opcode=PING) * 1000)
        read_to_end(connection)
        echo.expect(Refusal.MESSAGE_TOO_BIG)


def test_a_stranger_has_little_time_to_show_a_token() -> None:
    with Echo(authorize=know_sesame, limits=HASTY) as echo, dial(echo.port) as connection:
        shake(connection)
        assert read_close(connection) == 1008
        echo.expect(Refusal.NO_TOKEN)


def test_of_too_many_strangers_the_one_that_waited_longest_goes() -> None:
    limits = Limits(unauthenticated=2)
    with (
        Echo(authorize=know_sesame, limits=limits) as echo,
        dial(echo.port) as first,
        dial(echo.port) as second,
        dial(echo.port) as third,
    ):
        shake(second)
        shake(third)
        assert b" 503 " in read_to_end(first)
        transport = connect(echo.url, credentials=SESAME)
        assert read_close(second) == 1013
        assert ask(transport, b"still here") == b"still here"
        transport.close()


def test_with_too_many_clients_one_more_is_told_to_come_later() -> None:
    with Echo(authorize=know_sesame, limits=Limits(clients=1)) as echo:
        first = connect(echo.url, credentials=SESAME)
        with pytest.raises(ConnectionLost, match="too many clients") as caught:
            connect(echo.url, credentials=SESAME)
        assert caught.value.code == 503
        second = connect(echo.url)
        second.send([b"open sesame"])
        with pytest.raises(ConnectionLost, match="full") as caught:
            second.receive()
        assert caught.value.code == BUSY
        assert ask(first, b"hello") == b"hello"
        first.close()


def test_a_server_that_stops_says_that_it_restarts() -> None:
    with Echo() as echo:
        transport = connect(echo.url)
        assert ask(transport, b"hello") == b"hello"
    with pytest.raises(ConnectionLost) as caught:
        transport.receive()
    assert caught.value.code == RESTART


def test_web_pages_are_refused_unless_their_origin_is_allowed() -> None:
    with Echo(origins=["https://lab.example"]) as echo:
        for origin, status in [
            ("https://lab.example", b" 101 "),
            ("https://evil.example", b" 403 "),
            ("http://127.0.0.1", b" 403 "),
            ("null", b" 403 "),
        ]:
            with dial(echo.port) as connection:
                assert status in shake(connection, f"Origin: {origin}")
        echo.expect(Refusal.WRONG_ORIGIN)
    with Echo() as echo, dial(echo.port) as connection:
        assert b" 403 " in shake(connection, "Origin: https://lab.example")


@pytest.mark.parametrize("origin", ["lab.example", "https://lab.example/page", "*", ""])
def test_what_is_no_origin_cannot_be_allowed(origin: str) -> None:
    with pytest.raises(UsageError, match="no origin"), Echo(origins=[origin]):
        pass


def test_plain_http_is_answered_on_the_same_port() -> None:
    with Echo(authorize=know_sesame) as echo:
        for header, body in [
            ("", "well, None"),
            ("Authorization: Bearer open sesame\r\n", "well, open"),
        ]:
            with dial(echo.port) as connection:
                connection.sendall(f"GET /health HTTP/1.1\r\n{header}\r\n".encode())
                answer = read_to_end(connection).decode()
                assert " 200 " in answer
                assert body in answer
        with dial(echo.port) as connection:
            connection.sendall(b"GET /other HTTP/1.1\r\n\r\n")
            assert b" 426 " in read_to_end(connection)


def test_a_handshake_has_little_time_however_it_trickles() -> None:
    with Echo(limits=HASTY) as echo, dial(echo.port) as connection:
        trickle(connection, upgrade()[:-2])
        assert b" 408 " in read_to_end(connection)
        echo.expect(Refusal.HANDSHAKE_TOO_SLOW)


def test_a_handshake_of_many_headers_is_refused() -> None:
    with Echo() as echo, dial(echo.port) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\n" + b"X: " + b"y" * 8000 + b"\r\n")
        connection.sendall((b"X: " + b"y" * 8000 + b"\r\n") * 4)
        assert b" 431 " in read_to_end(connection)
        echo.expect(Refusal.MESSAGE_TOO_BIG)


def test_a_message_that_trickles_within_a_frame_is_cut_off() -> None:
    with Echo(limits=HASTY) as echo, dial(echo.port) as connection:
        shake(connection)
        trickle(connection, frame(bytes(100_000)))
        read_close(connection)
        echo.expect(Refusal.MESSAGE_TOO_SLOW)


def test_a_message_that_trickles_by_fragments_is_cut_off_in_spite_of_pings() -> None:
    with Echo(limits=HASTY) as echo, dial(echo.port) as connection:
        shake(connection)
        connection.sendall(frame(b"x", BINARY, flags=0))
        trickle(connection, (frame(b"x", CONT, flags=0) + frame(b"", PING)) * 10_000, step=15)
        read_to_end(connection)
        echo.expect(Refusal.MESSAGE_TOO_SLOW)


def test_a_connection_that_says_nothing_is_ended() -> None:
    with Echo(limits=HASTY) as echo, dial(echo.port) as connection:
        shake(connection)
        assert read_close(connection) == 1001
        echo.expect(Refusal.IDLE)
        assert "silent for 0.3 s" in echo.ended.get(timeout=PATIENCE)


def test_pings_alone_do_not_keep_a_connection() -> None:
    with Echo(limits=HASTY) as echo, dial(echo.port) as connection:
        shake(connection)
        trickle(connection, frame(b"", PING) * 10_000, step=6)
        read_to_end(connection)
        echo.expect(Refusal.IDLE)


@pytest.mark.parametrize("content", [b"", b"x"])
def test_a_message_of_too_many_fragments_is_refused(content: bytes) -> None:
    with Echo() as echo, dial(echo.port) as connection:
        shake(connection)
        rest = frame(content, CONT, flags=0) * MAX_FRAGMENTS
        connection.sendall(frame(content, BINARY, flags=0) + rest)
        assert read_close(connection) == 1009
        echo.expect(Refusal.TOO_MANY_FRAGMENTS)


def test_a_message_larger_than_allowed_is_refused_before_it_is_read() -> None:
    limits = Limits(message_bytes=1 << 20)
    with Echo(limits=limits) as echo, dial(echo.port) as connection:
        shake(connection)
        connection.sendall(frame(b"", length=(1 << 20) + 1))
        assert read_close(connection) == 1009
    with Echo(limits=limits) as echo, dial(echo.port) as connection:
        shake(connection)
        connection.sendall(frame(bytes(1 << 19), BINARY, flags=0))
        connection.sendall(frame(b"", CONT, length=(1 << 19) + 1))
        assert read_close(connection) == 1009
        echo.expect(Refusal.MESSAGE_TOO_BIG)


def test_compression_is_neither_offered_nor_understood() -> None:
    with Echo() as echo, dial(echo.port) as connection:
        head = shake(connection, "Sec-WebSocket-Extensions: permessage-deflate")
        assert b"extensions" not in head.lower()
        connection.sendall(frame(b"\x00", flags=FIN | 0x40))
        assert read_close(connection) == 1002
        echo.expect(Refusal.BROKEN_FRAME)


def test_who_talks_too_fast_is_slowed_and_not_cut() -> None:
    with Echo(limits=Limits(messages_per_second=100)) as echo:
        transport = connect(echo.url)
        for number in range(150):
            assert ask(transport, b"%d" % number) == b"%d" % number
        transport.close()
    assert echo.refusals.empty()


# --- a client and servers that are none -------------------------------------------------------


@contextmanager
def pretending(behave: Callable[[socket.socket], None]) -> Iterator[str]:
    """Listen for one connection, and let ``behave`` do with it what it likes."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def attend() -> None:
            connection, _ = listener.accept()
            with connection, suppress(OSError):
                connection.settimeout(PATIENCE)
                behave(connection)

        thread = threading.Thread(target=attend)
        thread.start()
        yield f"ws://127.0.0.1:{listener.getsockname()[1]}"
        thread.join()


def accept(connection: socket.socket) -> None:
    """Answer a websocket's handshake."""
    head = b""
    while b"\r\n\r\n" not in head:
        head += connection.recv(1 << 16)
    (key,) = re.findall(rb"Sec-WebSocket-Key: (\S+)", head)
    answer = base64.b64encode(hashlib.sha1(key + b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11").digest())
    connection.sendall(
        b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        b"Sec-WebSocket-Accept: " + answer + b"\r\n\r\n"
    )


def test_a_reply_that_does_not_begin_is_a_lost_connection() -> None:
    def be_silent(connection: socket.socket) -> None:
        accept(connection)
        connection.recv(1)  # until the client has had enough

    with pretending(be_silent) as url:
        transport = WebSocketTransport(url, reply_seconds=0.1)
        with pytest.raises(ConnectionLost, match=r"no reply within 0\.1 s"):
            transport.receive()
        transport.close()


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


@pytest.mark.parametrize("status", [301, 302, 307, 308, 300])
def test_a_redirect_is_not_followed(status: int) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        other.setblocking(False)
        target = f"ws://127.0.0.1:{other.getsockname()[1]}/"

        def redirect(connection: socket.socket) -> None:
            connection.recv(1 << 16)
            head = f"HTTP/1.1 {status} Found\r\nLocation: {target}\r\nContent-Length: 0\r\n\r\n"
            connection.sendall(head.encode())

        with pretending(redirect) as url, pytest.raises(Redirected, match=re.escape(target)):
            connect(url, credentials=SESAME)
        with pytest.raises(BlockingIOError):
            other.accept()  # nobody came


def test_messages_that_nobody_asked_for_are_not_read_without_end() -> None:
    stalled = threading.Event()

    def flood(connection: socket.socket) -> None:
        accept(connection)
        content = b"\x82\x7f" + (1 << 20).to_bytes(8, "big") + bytes(1 << 20)
        connection.settimeout(1)
        try:
            for _ in range(10):
                connection.sendall(content * 16)
        except TimeoutError:
            stalled.set()

    with pretending(flood) as url:
        transport = connect(url)
        assert stalled.wait(PATIENCE)
        first = transport.receive()  # what was kept can still be read
        assert len(first) == 1 << 20
        assert transport._socket.waiting_bytes <= bounded_connections.READ_AHEAD + (2 << 20)
        transport.close()


def test_a_message_larger_than_what_is_read_ahead_arrives_while_it_is_waited_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bounded_connections, "READ_AHEAD", 1000)
    with Echo() as echo:
        transport = connect(echo.url)
        for _ in range(3):
            assert ask(transport, bytes(2 * FRAGMENT + 5)) == bytes(2 * FRAGMENT + 5)
        for _ in range(3):  # two more wait while the first is read
            transport.send([bytes(5000)])
        assert [len(transport.receive()) for _ in range(3)] == [5000] * 3
        transport.send([bytes(5000)])
        transport.send([bytes(5000)])
        transport.close()  # in the middle of what waits


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


def test_who_has_gone_without_a_word_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connections, "LOST_SECONDS", 0.2)
    with Echo() as echo, dial(echo.port) as connection:
        shake(connection)
        assert read_to_end(connection) == b""
        assert echo.ended.get(timeout=PATIENCE)
    with Echo() as echo, dial(echo.port) as connection:
        shake(connection)
        trickle(connection, frame(bytes(100)))  # for a second, byte by byte: it is there
        assert connection.recv(1 << 16)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", ""])
def test_a_host_of_several_addresses_has_one_port(host: str) -> None:
    listeners = open_listeners(host, 0, HandshakeQuota(1, lambda: None))
    try:
        (port,) = {listener.getsockname()[1] for listener in listeners}
        with dial(port), pytest.raises(PortInUse):
            open_listeners(host, port, HandshakeQuota(1, lambda: None))
    finally:
        for listener in listeners:
            listener.close()


@pytest.mark.parametrize("host", ["192.0.2.1", "nowhere.invalid"])
def test_an_address_of_another_machine_cannot_be_listened_on(host: str) -> None:
    with pytest.raises(UsageError, match="cannot listen"):
        open_listeners(host, 0, HandshakeQuota(1, lambda: None))
