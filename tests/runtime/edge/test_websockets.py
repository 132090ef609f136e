"""A server's websockets: what is carried, who is let in, and how they end."""

from __future__ import annotations

import pytest

from splitonnx.errors import ConnectionLost, Unauthorized
from splitonnx.runtime.channels.credentials import Credentials
from splitonnx.runtime.channels.websockets import WebSocketTransport, connect
from splitonnx.runtime.edge.http import Refusal
from splitonnx.runtime.wire.close_codes import RESTART
from splitonnx.runtime.wire.fragments import FRAGMENT
from tests.support.echoes import Echo, dial, know_sesame, read_to_end, shake
from tests.support.event_loops import ON_BOTH_LOOPS

pytestmark = ON_BOTH_LOOPS

SESAME = Credentials(token="open sesame")


def ask(transport: WebSocketTransport, *chunks: bytes) -> bytes:
    transport.send(chunks)
    return bytes(transport.receive())


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
        assert ask(transport, bytes(20 << 10)) == bytes(20 << 10)  # more than comes before a token
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
