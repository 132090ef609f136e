"""What a client holds of what its server says unasked."""

from __future__ import annotations

import re
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from splitonnx.errors import ConnectionLost, MessageTooLarge, Redirected
from splitonnx.runtime.channels import bounded_connections
from splitonnx.runtime.channels.credentials import Credentials
from splitonnx.runtime.channels.websockets import WebSocketTransport, connect
from splitonnx.runtime.wire.fragments import FRAGMENT
from splitonnx.runtime.wire.tls import make_client_tls, make_server_tls
from tests.support.certificates import Files
from tests.support.echoes import PATIENCE, Echo
from tests.support.frozen_readers import LARGE, SLOW, freezing, read_slowly, send_pings
from tests.support.pretenders import accept, pretending

SESAME = Credentials(token="open sesame")


def ask(transport: WebSocketTransport, *chunks: bytes) -> bytes:
    transport.send(chunks)
    return bytes(transport.receive())


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


@pytest.mark.alone
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
        transport._socket.close_timeout = None  # for ever: there is nothing to wait for
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


@pytest.mark.alone
def test_a_few_large_messages_count_by_their_bytes_and_not_as_few() -> None:
    size, stalled = 8 << 20, threading.Event()

    def flood(connection: socket.socket) -> None:
        accept(connection)
        connection.settimeout(1)
        try:
            for _ in range(10):
                connection.sendall(b"\x82\x7f" + size.to_bytes(8, "big") + bytes(size))
        except TimeoutError:
            stalled.set()

    with pretending(flood) as url:
        transport = connect(url)
        assert stalled.wait(PATIENCE)
        assert transport._socket.waiting_bytes <= bounded_connections.READ_AHEAD + size
        assert len(transport.receive()) == size
        transport.close()


def test_what_was_taken_makes_room_for_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_connections, "READ_AHEAD", 10_000)
    with Echo() as echo:
        transport = connect(echo.url)
        for _ in range(8):
            transport.send([bytes(9_000)])
        for _ in range(8):
            assert len(transport.receive()) == 9_000
        assert transport._socket.waiting_bytes == 0
        transport.close()


@pytest.mark.alone
def test_a_message_that_nobody_waits_for_is_not_read_to_its_end() -> None:
    stalled = threading.Event()

    def announce(connection: socket.socket) -> None:
        accept(connection)
        connection.settimeout(1)
        try:
            connection.sendall(b"\x02\x7f" + (1 << 20).to_bytes(8, "big") + bytes(1 << 20))
            for _ in range(60):
                connection.sendall(b"\0\x7f" + (1 << 20).to_bytes(8, "big") + bytes(1 << 20))
        except TimeoutError:
            stalled.set()

    with pretending(announce) as url:
        transport = connect(url)
        assert stalled.wait(PATIENCE)
        assert transport._socket.is_underway
        assert transport._socket.waiting_bytes == 0
        transport.close()


@pytest.mark.parametrize("content", [b"", b"x"])
def test_a_message_of_too_many_fragments_is_refused(content: bytes) -> None:
    def crumble(connection: socket.socket) -> None:
        accept(connection)
        crumb = bytes([len(content)]) + content
        connection.sendall(b"\x02" + crumb + (b"\0" + crumb) * bounded_connections.MAX_FRAGMENTS)
        while connection.recv(1 << 16):
            continue

    with pretending(crumble) as url:
        transport = WebSocketTransport(url, message_seconds=0.4)
        with pytest.raises(MessageTooLarge, match="too many fragments"):
            transport.receive()
        transport.close()


def test_fragments_are_sent_one_after_the_other_by_one_thread_alone() -> None:
    with Echo() as echo:
        transport = connect(echo.url)
        transport._socket.send_in_progress = True
        with pytest.raises(ConnectionLost, match="another thread"):
            transport.send([bytes(2 * FRAGMENT)])
        transport._socket.send_in_progress = False
        assert ask(transport, bytes(2 * FRAGMENT)) == bytes(2 * FRAGMENT)
        transport.close()


def run_to_end(work: Callable[[], object]) -> None:
    """Run ``work`` in a thread, which has to end."""
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    assert not thread.is_alive()


def test_a_server_that_stops_reading_is_a_lost_connection() -> None:
    with freezing() as url:
        transport = WebSocketTransport(url, reply_seconds=0.2)
        with pytest.raises(ConnectionLost, match=r"took nothing of a message within 0\.2 s"):
            transport.send([LARGE])
        run_to_end(transport.close)


def test_so_it_is_with_tls(tmp_path: Path) -> None:
    files = Files(tmp_path)
    access = Credentials(tls=make_client_tls(authority=files.authority))
    with freezing(tls=make_server_tls(*files.server)) as url:
        transport = WebSocketTransport(url, credentials=access)
        transport._socket.limit_sending(0.2)
        with pytest.raises(ConnectionLost, match="took nothing of a message"):
            transport.send([LARGE])
        run_to_end(transport.close)


@pytest.mark.alone
def test_a_server_that_reads_slowly_is_not_lost() -> None:
    with pretending(read_slowly) as url:
        transport = WebSocketTransport(url, reply_seconds=1)  # half as long as the message takes
        assert ask(transport, SLOW) == b"ok"
        transport.close()


def test_ctrl_c_ends_sending_to_a_server_that_stopped_reading() -> None:
    main = threading.main_thread().ident
    assert main is not None

    def interrupt(connection: socket.socket) -> None:
        assert connection.recv(1 << 20)  # the message has begun, and more than is read follows
        signal.pthread_kill(main, signal.SIGINT)

    with freezing(interrupt) as url:
        transport = connect(url)
        with pytest.raises(KeyboardInterrupt):
            transport.send([LARGE])
        run_to_end(transport.close)
        with pytest.raises(ConnectionLost):
            transport.send([b"late"])


def test_closing_ends_what_another_thread_sends() -> None:
    lost = threading.Event()

    def send() -> None:
        with pytest.raises(ConnectionLost):
            transport.send([LARGE])
        lost.set()

    with freezing() as url:
        transport = connect(url)
        transport._socket.close_timeout = 0.2
        sending = threading.Thread(target=send, daemon=True)
        sending.start()
        run_to_end(transport.close)
        assert lost.wait(PATIENCE)


@pytest.mark.parametrize("seconds", [0.2, 600.0])
def test_pings_of_a_server_that_reads_no_answers_hold_nothing_up(seconds: float) -> None:
    stalled = threading.Event()

    def flood(connection: socket.socket) -> None:
        send_pings(connection)
        stalled.set()

    with freezing(flood) as url:
        transport = connect(url)
        transport._socket.close_timeout = 0.2
        transport._socket.limit_sending(seconds)
        assert stalled.wait(PATIENCE)
        if seconds < 1:
            with pytest.raises(ConnectionLost, match="took nothing"):
                transport.receive()
        run_to_end(transport.close)
