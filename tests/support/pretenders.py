"""Servers of a client's nightmares: raw sockets that answer a websocket as they like."""

from __future__ import annotations

import base64
import hashlib
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from tests.support.echoes import PATIENCE


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
