"""A client's websocket on a loop: what its server's answers, silences and ends come to."""

from __future__ import annotations

import asyncio
import re
import socket
import threading
from pathlib import Path

import numpy as np
import pytest

from splitonnx.codecs import encode_tensors
from splitonnx.errors import (
    ConnectionLost,
    MessageTooLarge,
    ProtocolError,
    Redirected,
    SplitonnxError,
    Unauthorized,
    UntrustedPeer,
    UsageError,
)
from splitonnx.runtime.channels.asynchronous.websockets import (
    AsyncWebSocketTransport,
    choose_dial,
    connect,
)
from splitonnx.runtime.channels.credentials import Credentials
from splitonnx.runtime.limits import Limits
from splitonnx.runtime.wire.fragments import FRAGMENT
from splitonnx.runtime.wire.tls import make_client_tls, make_server_tls
from tests.support.certificates import Files
from tests.support.echoes import Echo, know_sesame, trickle
from tests.support.pretenders import accept, pretending

SESAME = Credentials(token="open sesame")


async def ask(transport: AsyncWebSocketTransport, *chunks: bytes) -> bytes:
    await transport.send(chunks)
    return bytes(await transport.receive())


def fail(url: str, error: type[SplitonnxError], match: str = "", **settings: float) -> None:
    """Open a connection, wait for a message, and expect an error."""

    async def wait() -> None:
        transport = await AsyncWebSocketTransport.open(url, **settings)  # type: ignore[arg-type]
        with pytest.raises(error, match=match):
            await transport.receive()
        await transport.close()

    asyncio.run(wait())


def test_messages_arrive_whole_there_and_back() -> None:
    content = np.random.default_rng(0).bytes(3 * FRAGMENT + 5)

    async def talk() -> None:
        transport = await connect(echo.url, credentials=SESAME)
        for size in (0, 1, FRAGMENT, FRAGMENT + 1, len(content)):
            assert (
                await ask(transport, content[: size // 2], content[size // 2 : size])
                == (content[:size])
            )
        await transport.close()
        await transport.close()
        with pytest.raises(ConnectionLost):
            await transport.send([b"late"])

    with Echo(authorize=know_sesame) as echo:
        asyncio.run(talk())


def test_a_reply_that_does_not_begin_is_a_lost_connection() -> None:
    def be_silent(connection: socket.socket) -> None:
        accept(connection)
        connection.recv(1)  # until the client has had enough

    with pretending(be_silent) as url:
        fail(url, ConnectionLost, r"no reply within 0\.1 s", reply_seconds=0.1)


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
        fail(url, ConnectionLost, r"a reply took longer than 0\.2 s", message_seconds=0.2)


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
        asyncio.run(connect(url, credentials=SESAME))
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
            asyncio.run(connect(url, credentials=SESAME))
        with pytest.raises(BlockingIOError):
            other.accept()  # nobody came


def test_a_server_that_does_not_answer_the_handshake_is_a_lost_connection() -> None:
    def be_silent(connection: socket.socket) -> None:
        while connection.recv(1 << 16):  # until the client has had enough
            continue

    with pretending(be_silent) as url, pytest.raises(ConnectionLost, match="timed out"):
        asyncio.run(AsyncWebSocketTransport.open(url, open_seconds=0.1))
    with pytest.raises(ConnectionLost):
        asyncio.run(connect("ws://127.0.0.1:1"))


def test_limits_hold_for_what_the_server_sends_and_for_what_it_takes() -> None:
    async def talk() -> None:
        transport = await connect(echo.url, credentials=Credentials(message_bytes=1000))
        assert await ask(transport, bytes(1000)) == bytes(1000)
        with pytest.raises(MessageTooLarge, match="--max-message-bytes"):
            await ask(transport, bytes(1001))
        await transport.close()
        transport = await connect(echo.url)
        with pytest.raises(MessageTooLarge, match="--max-message-bytes"):
            await ask(transport, bytes(3 << 20))
        await transport.close()

    with Echo(limits=Limits(message_bytes=1 << 20)) as echo:
        asyncio.run(talk())


def test_a_server_that_stays_after_a_reply_that_is_too_large_is_left(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    module = "splitonnx.runtime.channels.asynchronous.connections"
    monkeypatch.setattr(f"{module}.HANG_UP_SECONDS", 0.1)

    def boast(connection: socket.socket) -> None:
        accept(connection)
        connection.sendall(b"\x82\x7f" + (257 << 20).to_bytes(8, "big"))
        while connection.recv(1 << 16):  # it does not close its side
            continue

    with pretending(boast) as url:
        fail(url, MessageTooLarge, "sent a message larger")


def test_an_address_that_is_none_is_refused_as_are_credentials_without_an_address() -> None:
    for url in ("http://127.0.0.1:1", "ws://user:secret@127.0.0.1:1"):
        with pytest.raises(UsageError):
            asyncio.run(connect(url))

    async def dial() -> AsyncWebSocketTransport:
        raise AssertionError

    assert choose_dial(dial, None) is dial
    with pytest.raises(UsageError, match="URL"):
        choose_dial(dial, SESAME)


def test_a_proxy_of_the_environment_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("ws_proxy", "http://127.0.0.1:1")

    async def talk() -> None:
        transport = await connect(echo.url)
        assert await ask(transport, b"hello") == b"hello"
        await transport.close()

    with Echo() as echo:
        asyncio.run(talk())


def test_a_send_that_is_cancelled_ends_the_connection() -> None:
    def be_deaf(connection: socket.socket) -> None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 12)
        accept(connection)
        ended.wait()

    async def send() -> None:
        transport = await connect(url)
        sending = asyncio.create_task(transport.send([bytes(64 << 20)]))
        while not transport._connection.transport.get_write_buffer_size():
            await asyncio.sleep(0)
        sending.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sending
        with pytest.raises(ConnectionLost):
            await transport.receive()
        await transport.close()

    ended = threading.Event()
    with pretending(be_deaf) as url:
        try:
            asyncio.run(send())
        finally:
            ended.set()


def test_only_servers_of_the_authority_are_trusted_and_clients_that_have_a_certificate(
    tmp_path: Path,
) -> None:
    files = Files(tmp_path)
    sent = encode_tensors({"x": np.random.default_rng(0).standard_normal(1 << 18)})  # 2 MiB
    tls = make_server_tls(*files.server, client_authority=files.authority)

    async def talk(ours: Credentials) -> bytes:
        transport = await connect(echo.url, credentials=ours)
        try:
            await transport.send(sent)
            return bytes(await transport.receive())
        finally:
            await transport.close()

    with Echo(tls=tls) as echo:
        own = {"certificate": files.client[0], "key": files.client[1]}
        trusting = make_client_tls(authority=files.authority, **own)
        assert asyncio.run(talk(Credentials(tls=trusting))) == b"".join(sent)
        other = make_client_tls(authority=files.other_authority, **own)
        with pytest.raises(UntrustedPeer):
            asyncio.run(talk(Credentials(tls=other)))
        without = make_client_tls(authority=files.authority)
        with pytest.raises(ProtocolError, match="certificate"):
            asyncio.run(talk(Credentials(tls=without)))
