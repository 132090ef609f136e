"""A client's socket whose large payloads are received where they stay.

The websockets library receives all bytes into fresh memory, from which they are copied.
"""

from __future__ import annotations

import socket

from splitonnx.runtime.wire.payloads import PayloadReader


class DirectSocket:
    """A connected socket without TLS, from which the websockets library reads.

    It has what the library calls of a socket.  TLS decrypts whole records, of which a part would
    remain where no poll sees it if the memory were too short.
    """

    def __init__(self, connected: socket.socket, reader: PayloadReader) -> None:
        self._reader = reader
        self._socket = connected
        self.fileno = connected.fileno
        self.settimeout = connected.settimeout
        self.getsockname = connected.getsockname
        self.getpeername = connected.getpeername
        self.getsockopt = connected.getsockopt
        self.shutdown = connected.shutdown
        self.close = connected.close

    def sendall(self, data: bytes) -> None:
        """Send ``data``; the socket's time limit is for each part that the other side takes.

        Raises:
            TimeoutError: it took nothing for that time.
        """
        rest = memoryview(data).cast("B")
        while rest:
            rest = rest[self._socket.send(rest) :]

    def recv(self, size: int) -> bytes:
        """Receive at most ``size`` bytes, or any number of those of a large payload.

        The latter are where they belong already: the result is then :data:`RECEIVED`.  Where the
        stream ends, the result is empty.
        """
        gap = self._reader.gap
        if not gap:
            return self._socket.recv(size)
        received = self._socket.recv_into(gap)
        if not received:
            return b""
        self._reader.fill(received)
        return RECEIVED


class _Received(bytes):
    """No bytes, but not the end of a stream, for which the library compares with ``b""``."""

    def __eq__(self, other: object) -> bool:
        return self is other

    def __ne__(self, other: object) -> bool:
        return self is not other

    def __hash__(self) -> int:
        return id(self)


RECEIVED = _Received()
"""Returned instead of bytes that were received elsewhere."""
