"""A server of websockets that says back what it hears, and raw sockets that break its rules."""

from __future__ import annotations

import asyncio
import queue
import socket
import ssl
import struct
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager

from splitonnx.errors import ConnectionLost, ServerBusy
from splitonnx.runtime.edge.http import Authorize, HttpRequest, HttpResponse, Refusal
from splitonnx.runtime.edge.tokens import Identity
from splitonnx.runtime.edge.websockets import Peer, serve
from splitonnx.runtime.limits import Limits
from splitonnx.runtime.scheduling import event_loops
from splitonnx.runtime.wire.close_codes import BUSY, POLICY

PATIENCE = 20.0
"""Seconds after which a test fails rather than waits."""
PIECES, PAUSE = 2000, 0.01
"""The most pieces that are sent slowly, and the seconds between two: as long as its patience."""

TEXT, BINARY, CONT, PING = 1, 2, 0, 9
FIN = 0x80


class Echo:
    """Serves while the context lasts; a first message is a token, unless the header had one."""

    def __init__(
        self,
        *,
        limits: Limits | None = None,
        tls: ssl.SSLContext | None = None,
        origins: Sequence[str] = (),
        authorize: Authorize | None = None,
    ) -> None:
        self.port = 0
        self.refusals: queue.Queue[Refusal] = queue.Queue()
        self.ended: queue.Queue[str] = queue.Queue()
        self.owners: queue.Queue[str | None] = queue.Queue()
        self._settings = (limits, tls, origins, authorize)
        self._authorize = authorize
        self._stop: asyncio.Event | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    @property
    def url(self) -> str:
        return f"{'wss' if self._settings[1] else 'ws'}://127.0.0.1:{self.port}"

    def __enter__(self) -> Echo:
        started: Future[None] = Future()
        self._thread = threading.Thread(target=self._run_in_thread, args=(started,))
        self._thread.start()
        started.result(PATIENCE)
        return self

    def __exit__(self, *_: object) -> None:
        assert self._loop is not None
        assert self._stop is not None
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join()

    def expect(self, refusal: Refusal) -> None:
        """Wait until something was refused for this reason."""
        while self.refusals.get(timeout=PATIENCE) is not refusal:
            continue

    def _run_in_thread(self, started: Future[None]) -> None:
        try:
            event_loops.run(self._run(started))
        except BaseException as error:
            if started.done():
                raise
            started.set_exception(error)

    async def _run(self, started: Future[None]) -> None:
        limits, tls, origins, authorize = self._settings
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        serving = serve(
            self._serve,
            "127.0.0.1",
            0,
            limits=limits,
            tls=tls,
            origins=origins,
            authorize=authorize,
            respond=_respond,
            on_refusal=lambda refusal, _: self.refusals.put(refusal),
        )
        async with serving as self.port:
            started.set_result(None)
            await self._stop.wait()

    async def _serve(self, peer: Peer) -> None:
        self.owners.put(peer.owner)
        try:
            if peer.owner is None and not await self._log_in(peer):
                return
            while True:
                await peer.send([memoryview(await peer.receive())])
        except ConnectionLost as error:
            self.ended.put(error.reason)

    async def _log_in(self, peer: Peer) -> bool:
        assert self._authorize is not None
        identity = self._authorize(bytes(await peer.receive()).decode())
        if identity is None:
            await peer.close(POLICY, "unknown token")
            return False
        try:
            await peer.admit(identity)
        except ServerBusy:
            await peer.close(BUSY, "full")
            return False
        await peer.send([b"welcome, ", identity.owner.encode()])
        return True


def _respond(request: HttpRequest) -> HttpResponse | None:
    if request.path == "/health":
        return HttpResponse(200, "text/plain", f"well, {request.token}".encode())
    return None


def know_sesame(token: str) -> Identity | None:
    """Know one token, and whose it is."""
    return Identity(owner="ali") if token == "open sesame" else None


@contextmanager
def dial(port: int) -> Iterator[socket.socket]:
    """Connect a raw socket."""
    with socket.create_connection(("127.0.0.1", port), timeout=PATIENCE) as connection:
        yield connection


def upgrade(*headers: str) -> bytes:
    """Write the request that begins a websocket."""
    lines = [
        "GET / HTTP/1.1",
        "Host: 127.0.0.1",
        "Upgrade: websocket",
        "Connection: Upgrade",
        "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==",
        "Sec-WebSocket-Version: 13",
        *headers,
    ]
    return "\r\n".join([*lines, "", ""]).encode()


def shake(connection: socket.socket, *headers: str) -> bytes:
    """Go through the handshake and give the response's head."""
    connection.sendall(upgrade(*headers))
    head = b""
    while b"\r\n\r\n" not in head:
        part = connection.recv(1)
        assert part, head
        head += part
    return head


def frame(
    content: bytes, opcode: int = BINARY, flags: int = FIN, length: int | None = None
) -> bytes:
    """Write a client's frame; ``length`` may lie, ``flags`` may hold reserved bits."""
    size = len(content) if length is None else length
    if size < 126:
        head = struct.pack("!BB", flags | opcode, 0x80 | size)
    elif size < 1 << 16:
        head = struct.pack("!BBH", flags | opcode, 0x80 | 126, size)
    else:
        head = struct.pack("!BBQ", flags | opcode, 0x80 | 127, size)
    return head + bytes(4) + content  # a mask of zeros


def read_to_end(connection: socket.socket) -> bytes:
    """Read until the server has closed the connection."""
    content = b""
    try:
        while part := connection.recv(1 << 16):
            content += part
    except ConnectionResetError:  # it closed while we were still sending
        pass
    return content


def read_close(connection: socket.socket) -> int:
    """Read until the server has closed the connection, and give its last frame's closing code."""
    content = read_to_end(connection)
    while content:
        opcode, size = content[0] & 15, content[1]
        body, content = content[2 : 2 + size], content[2 + size :]
        if opcode == 8:
            code: int = struct.unpack("!H", body[:2])[0]
            return code
    raise AssertionError("it closed without a closing frame")


def trickle(connection: socket.socket, content: bytes, step: int = 1) -> None:
    """Send in small pieces until all is sent or the server ends it, which it must do in time."""
    tick = threading.Event()
    try:
        for start in range(0, min(len(content), step * PIECES), step):
            connection.sendall(content[start : start + step])
            tick.wait(PAUSE)
            if _has_ended(connection):
                return
    except (BrokenPipeError, ConnectionResetError):
        return
    assert len(content) <= step * PIECES, "it lets itself be kept waiting"


def _has_ended(connection: socket.socket) -> bool:
    """Whether the server's answer, if it gave one, is the last."""
    connection.setblocking(False)
    try:
        return connection.recv(1, socket.MSG_PEEK) in (b"", b"H", b"\x88")
    except BlockingIOError:
        return False
    finally:
        connection.settimeout(PATIENCE)
