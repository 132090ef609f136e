"""Servers that accept a websocket and then read nothing of what is sent, or little at a time."""

from __future__ import annotations

import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tests.support.echoes import PATIENCE
from tests.support.pretenders import accept, pretending

LARGE = bytes(64 << 20)
"""More than the buffers of two sockets hold."""
SLOW = bytes(16 << 20)
"""What takes seconds to read slowly."""
PINGS = (b"\x89\x7d" + bytes(125)) * 1000


@contextmanager
def freezing(
    begin: Callable[[socket.socket], object] = lambda _: None, *, tls: ssl.SSLContext | None = None
) -> Iterator[str]:
    """Run a server that accepts a websocket, calls ``begin``, and then reads nothing more."""
    is_over = threading.Event()

    def freeze(connection: socket.socket) -> None:
        if tls is not None:
            connection = tls.wrap_socket(connection, server_side=True)
        with connection:
            accept(connection)
            begin(connection)
            is_over.wait(PATIENCE)

    with pretending(freeze) as url:
        try:
            yield url if tls is None else url.replace("ws://", "wss://")
        finally:
            is_over.set()


def send_pings(connection: socket.socket) -> None:
    """Send pings until the other side takes no more for half a second, or ends the connection."""
    connection.settimeout(0.5)
    try:
        while True:
            connection.sendall(PINGS)
    except OSError:
        return


def read_slowly(connection: socket.socket) -> None:
    """Read the message ``SLOW``, a part every few hundredths of a second, and answer it."""
    accept(connection)
    pace = threading.Event()
    count = 0
    while count < len(SLOW):
        pace.wait(0.03)
        count += len(connection.recv(1 << 18))
    connection.sendall(b"\x82\x02ok")
    connection.recv(1)  # until the client has had its answer
