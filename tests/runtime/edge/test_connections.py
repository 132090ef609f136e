"""A server's connections: what is refused, slowed or ended, and at which limit."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import Callable

import pytest

from splitonnx.runtime.channels.websockets import WebSocketTransport, connect
from splitonnx.runtime.edge import connections
from splitonnx.runtime.edge.connections import MAX_FRAGMENTS
from splitonnx.runtime.edge.http import Refusal
from splitonnx.runtime.edge.rate_limits import Timers
from splitonnx.runtime.edge.websockets import Peer
from splitonnx.runtime.limits import Limits
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
from tests.support.event_loops import ON_BOTH_LOOPS

pytestmark = [pytest.mark.alone, *ON_BOTH_LOOPS]

HASTY = Limits(handshake_seconds=0.2, login_seconds=0.2, message_seconds=0.2, idle_seconds=0.3)


def ask(transport: WebSocketTransport, *chunks: bytes) -> bytes:
    transport.send(chunks)
    return bytes(transport.receive())


def test_not_more_than_a_token_may_come_before_it() -> None:
    limits = Limits(unauthenticated_bytes=1000)
    with Echo(authorize=know_sesame, limits=limits) as echo, dial(echo.port) as connection:
        shake(connection)
        connection.sendall(frame(b"", length=1001))  # the announcement is enough
        assert read_close(connection) == 1009
        echo.expect(Refusal.MESSAGE_TOO_BIG)


def test_nor_may_many_small_messages_come_before_it() -> None:
    with Echo(authorize=know_sesame) as echo, dial(echo.port) as connection:
        shake(connection)
        connection.sendall(frame(bytes(100), opcode=PING) * 1000)
        read_to_end(connection)
        echo.expect(Refusal.MESSAGE_TOO_BIG)


def test_there_is_little_time_to_show_a_token() -> None:
    with Echo(authorize=know_sesame, limits=HASTY) as echo, dial(echo.port) as connection:
        shake(connection)
        assert read_close(connection) == 1008
        echo.expect(Refusal.NO_TOKEN)


def test_nobody_is_cut_off_before_the_limits_that_were_set(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started: dict[str, float] = {}

    class Recording(Timers):
        def start(self, name: str, seconds: float, function: Callable[[], object]) -> None:
            started.setdefault(name, seconds)
            super().start(name, seconds, function)

    monkeypatch.setattr(connections, "Timers", Recording)
    limits = Limits(handshake_seconds=31, login_seconds=32, message_seconds=33)
    with Echo(authorize=know_sesame, limits=limits) as echo, dial(echo.port) as connection:
        shake(connection)
        connection.sendall(frame(b"open", BINARY, flags=0))
        connection.sendall(frame(b" sesame", CONT))
        connection.recv(1)
    limited = {name: started[name] for name in ("handshake", "login", "message")}
    assert limited == {"handshake": 31, "login": 32, "message": 33}


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


def test_large_messages_that_wait_to_be_read_stop_the_reading(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """One that is waited for is read to its end, however large it is."""
    monkeypatch.setattr(connections, "KEPT_BYTES", 1000)
    sizes = [3 << 20, 2000, 3 << 20, 0, 500, 2 << 20]
    with Echo() as echo:
        transport = connect(echo.url)
        for size in sizes:
            transport.send([bytes(size)])
        assert [len(transport.receive()) for _ in sizes] == sizes
        transport.close()
    assert echo.refusals.empty()


class Late(Echo):
    """Says which bytes are unread once it reads no more, with and without reading ahead."""

    def __init__(self, ahead: int) -> None:
        super().__init__()
        self.kept: queue.Queue[int] = queue.Queue()
        self._ahead = ahead

    async def _serve(self, peer: Peer) -> None:
        connection = peer._connection
        peer.read_ahead(self._ahead)
        await peer.receive()
        while "kept" not in connection._pauses:
            await asyncio.sleep(0)
        self.kept.put(connection.kept)
        await super()._serve(peer)


@pytest.mark.parametrize("ahead", [0, 5 << 20])
def test_a_message_may_arrive_while_others_are_handled(
    monkeypatch: pytest.MonkeyPatch, ahead: int
) -> None:
    monkeypatch.setattr(connections, "KEPT_BYTES", 1000)
    echo = Late(ahead)
    with echo:
        transport = connect(echo.url)
        for _ in range(4):
            transport.send([bytes(3 << 20)])
        kept = echo.kept.get(timeout=PATIENCE)
        assert ahead + 1000 < kept < ahead + (2 << 20)
        assert [len(transport.receive()) for _ in range(3)] == [3 << 20] * 3
        transport.close()


def test_a_large_frame_that_trickles_is_cut_off() -> None:
    with Echo(limits=HASTY) as echo, dial(echo.port) as connection:
        shake(connection)
        connection.sendall(frame(bytes(1 << 20))[: 1 << 19])
        trickle(connection, bytes(1 << 19), step=1000)
        read_close(connection)
        echo.expect(Refusal.MESSAGE_TOO_SLOW)
