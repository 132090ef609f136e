"""A server between a page and an honest one: it passes on what it is not told to lie about.

It reads each answer of the honest server as the message that it is, so that a lie may depend on it,
and gives out files in any way that a socket allows.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from http import HTTPStatus
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
from websockets.exceptions import ConnectionClosed
from websockets.protocol import Protocol, Side
from websockets.sync.client import connect
from websockets.sync.connection import Connection
from websockets.utils import accept_key

from splitonnx.messages import Message, decode_message

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Raw:
    """Bytes as they go through the socket, whether they are a frame or not."""

    content: bytes


Word = str | bytes | Iterable[bytes] | Raw
"""A message in a text frame, in one binary frame, or in a fragment for each of its parts."""
HANG_UP = ""
"""In place of a message: the connection ends."""
Tell = Callable[[Message, Arrays], Sequence[Word] | None]
"""Return what is said in place of a message; ``None`` lets it pass."""

_OWN = ("connection", "date", "server", "transfer-encoding")


@dataclass(frozen=True, kw_only=True)
class Body:
    """A file as it is given out: ``length`` is what is announced, ``None`` up to the closing."""

    parts: Iterable[bytes]
    length: int | None = None
    encoding: str | None = None


def whole(content: bytes) -> Body:
    """Give a file out in one piece."""
    return Body(parts=[content], length=len(content))


def tell_the_truth(message: Message, arrays: Arrays) -> None:
    """Let every message pass."""


class LyingServer(ThreadingHTTPServer):
    """Serves while the context lasts; ``tell`` and ``files`` may be changed at any time.

    ``files`` are the lies about files, by path.  ``poured`` is how many bytes of the last of them
    the page took before it had enough.
    """

    daemon_threads = False  # they are waited for

    def __init__(self, honest: int) -> None:
        super().__init__(("127.0.0.1", 0), _Visit)
        self.honest = honest
        self.tell: Tell = tell_the_truth
        self.files: dict[str, Body] = {}
        self.poured = 0
        self._sockets: list[socket.socket] = []
        self._thread = threading.Thread(target=self.serve_forever, args=(0.05,))

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.server_address[1]}"

    def __enter__(self) -> LyingServer:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self._thread.join()
        self.cut()
        self.server_close()

    def be_honest(self) -> None:
        """Lie no more."""
        self.tell, self.files = tell_the_truth, {}

    def cut(self) -> None:
        """End every connection."""
        for one in self._sockets:
            with suppress(OSError):  # it has ended already
                one.shutdown(socket.SHUT_RDWR)

    def get_request(self) -> tuple[socket.socket, object]:
        """Take a connection, to be ended with the server."""
        near, address = super().get_request()
        self._sockets.append(near)
        return near, address


class _Visit(BaseHTTPRequestHandler):
    """One connection, which makes one request."""

    server: LyingServer

    def do_GET(self) -> None:
        lie = self.server.files.get(self.path)
        if self.headers.get("Upgrade") == "websocket":
            self._open_websocket()
        elif lie is None:
            self._pass_on()
        else:
            self._pour(lie)

    def log_message(self, *_: object) -> None:
        pass

    def _pass_on(self) -> None:
        honest = HTTPConnection("127.0.0.1", self.server.honest)
        wanted = {name: value for name in _ASKED if (value := self.headers.get(name))}
        honest.request("GET", self.path, headers=wanted)
        answer = honest.getresponse()
        self.send_response(answer.status)
        for name, value in answer.getheaders():
            if name.lower() not in _OWN:
                self.send_header(name, value)
        self.end_headers()
        with suppress(ConnectionError):  # the page may have gone
            self.wfile.write(answer.read())
        honest.close()

    def _pour(self, body: Body) -> None:
        self.send_response(HTTPStatus.OK)
        if body.length is not None:
            self.send_header("Content-Length", str(body.length))
        if body.encoding is not None:
            self.send_header("Content-Encoding", body.encoding)
        self.end_headers()
        self.server.poured = 0
        with suppress(ConnectionError):  # the page had enough
            for part in body.parts:
                self.wfile.write(part)
                self.server.poured += len(part)

    def _open_websocket(self) -> None:
        self.protocol_version = "HTTP/1.1"
        self.send_response(HTTPStatus.SWITCHING_PROTOCOLS)
        self.send_header("Upgrade", "websocket")
        self.send_header("Connection", "Upgrade")
        self.send_header("Sec-WebSocket-Accept", accept_key(self.headers["Sec-WebSocket-Key"]))
        self.end_headers()
        near = Connection(self.connection, Protocol(Side.SERVER, max_size=None))
        honest = f"ws://127.0.0.1:{self.server.honest}"
        with near, connect(honest, compression=None, max_size=None) as far:
            back = threading.Thread(target=self._carry_back, args=(far, near))
            back.start()
            with suppress(ConnectionClosed):
                for content in near:
                    far.send(content)
            far.close()
            back.join()
        self.close_connection = True

    def _carry_back(self, far: Connection, near: Connection) -> None:
        with suppress(ConnectionClosed):
            for content in far:
                assert isinstance(content, bytes)
                words = self.server.tell(*decode_message(content))
                for word in [content] if words is None else words:
                    if word == HANG_UP:
                        near.close()
                    if isinstance(word, Raw):
                        near.socket.sendall(word.content)
                    else:
                        near.send(word)
        near.close()


_ASKED = ("Accept-Encoding", "If-None-Match")
