"""Listening sockets that count accepted connections, before TLS or HTTP begins.

A connection in the middle of its TLS handshake is known to no one but the event loop, which keeps
some 300 KiB for it; so the count begins at ``accept`` and ends when the socket is closed.  This
module knows neither TLS nor websockets.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import math
import os
import socket
import time
from collections.abc import Callable
from typing import Any

from splitonnx.errors import PortInUse, UsageError
from splitonnx.runtime.edge.descriptors import SCARCE, find_ceiling

BACKLOG = 128
"""Connections that the operating system keeps waiting, and the most that are let in at a time."""

GRACE_SECONDS = 1.0
"""Seconds that a connection has for its handshake, however many others come."""
SWEEP = 64
"""Connections that are ended early between two searches for their memory."""

RETRY_SECONDS = 1.0
"""Seconds for which the event loop stops accepting once it has no descriptor left."""

_ABSENT = {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}


class HandshakeQuota:
    """Counts the sockets of one server that are between ``accept`` and their handshake's end.

    ``capacity`` is how many may.  With one more the oldest is shut down if it has had
    ``GRACE_SECONDS``, and else the newest: so a crowd can neither keep others out for long nor
    make the server begin more than it can end.  ``on_full`` is called for each of them, and
    ``on_scarce`` for each connection that is closed for want of file descriptors.
    """

    def __init__(
        self,
        capacity: int,
        on_full: Callable[[], object],
        on_scarce: Callable[[], object] = lambda: None,
    ) -> None:
        self._capacity = capacity
        self._ceiling = find_ceiling()
        self._on_full = on_full
        self.on_scarce = on_scarce
        self._waiting: dict[int, AcceptedSocket] = {}
        self._dropped = 0

    def admit(self, client: AcceptedSocket) -> bool:
        """Count a socket that was just accepted, if there is room."""
        if client.fileno() >= self._ceiling:
            self.on_scarce()
            return False
        if len(self._waiting) >= self._capacity:
            self._on_full()
            oldest = next(iter(self._waiting.values()))
            if time.monotonic() - oldest.came < GRACE_SECONDS:
                return False
            del self._waiting[oldest.fileno()]
            oldest.shut_down()
            self.sweep()
        self._waiting[client.fileno()] = client
        return True

    def sweep(self) -> None:
        """Free the memory of connections that were ended early, after every ``SWEEP`` of them.

        What asyncio keeps for one is a cycle of few objects and 256 KiB, and the collector, which
        counts objects, would let hundreds of them pile up.
        """
        self._dropped += 1
        if self._dropped % SWEEP == 0:
            gc.collect()

    def release(self, number: int) -> None:
        """Count a socket, known by its file number, no longer: others look after it now."""
        self._waiting.pop(number, None)

    def forget(self, client: AcceptedSocket) -> None:
        """Forget a socket that is about to be closed."""
        if self._waiting.get(client.fileno()) is client:
            del self._waiting[client.fileno()]


class AcceptedSocket(socket.socket):
    """An accepted socket, which tells its quota when it is closed."""

    quota: HandshakeQuota | None = None
    came = 0.0

    def shut_down(self) -> None:
        """Shut the connection down; the event loop, which alone may close it, then sees its end."""
        try:
            self.shutdown(socket.SHUT_RDWR)
        except OSError:  # the other side was quicker
            return

    def close(self) -> None:
        """Close the socket, which no longer counts."""
        if self.quota is not None:
            self.quota.forget(self)
            self.quota = None
        super().close()


class Listener(socket.socket):
    """A listening socket that counts what it accepts."""

    quota: HandshakeQuota
    _failed = -math.inf

    def accept(self) -> tuple[socket.socket, object]:
        """Accept a connection for which there is room.

        Raises:
            OSError: there is no descriptor for any; the event loop waits a second then.  It would
                try again at once, and log each time, were it not told that nobody is there.
        """
        if time.monotonic() - self._failed < RETRY_SECONDS / 2:
            raise BlockingIOError
        for _ in range(BACKLOG):
            try:
                accepted, address = super().accept()
            except OSError as error:
                if error.errno in SCARCE:
                    self._failed = time.monotonic()
                    self.quota.on_scarce()
                raise
            client = AcceptedSocket(fileno=accepted.detach())
            client.came = time.monotonic()
            if self.quota.admit(client):
                client.quota = self.quota
                return client, address
            client.close()
        raise BlockingIOError  # the event loop has other things to do


def open_listeners(host: str, port: int, quota: HandshakeQuota) -> list[Listener]:
    """Listen on every address that ``host`` stands for; an empty one stands for all.

    With port 0 any free port is taken, the same for all.

    Raises:
        PortInUse: another program has the port.
        UsageError: the address is not one of this machine's.
    """
    listeners: list[Listener] = []
    fault: OSError | None = None
    try:
        for family, address in _find_addresses(host, port):
            chosen = listeners[0].getsockname()[1] if listeners else port
            try:
                listeners.append(_open_listener(family, (address[0], chosen, *address[2:]), quota))
            except OSError as error:
                if error.errno not in _ABSENT:
                    raise
                fault = error  # a machine without IPv6 has a name for it all the same
        if fault is not None and not listeners:
            raise fault
    except OSError as error:
        for listener in listeners:
            listener.close()
        if error.errno == errno.EADDRINUSE:
            raise PortInUse(host, port) from error
        raise UsageError(f"cannot listen on {host}:{port}: {error.strerror}") from error
    return listeners


def _find_addresses(host: str, port: int) -> list[tuple[socket.AddressFamily, tuple[Any, ...]]]:
    found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    return list(dict.fromkeys((family, address) for family, _, _, _, address in found))


def _open_listener(
    family: socket.AddressFamily, address: tuple[Any, ...], quota: HandshakeQuota
) -> Listener:
    listener = Listener(family, socket.SOCK_STREAM)
    listener.quota = quota
    try:
        if os.name == "posix":
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        listener.bind(address)
        listener.listen(BACKLOG)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener


def ignore_scarcity(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
    """Handle what the event loop could not; a listener has reported scarce descriptors already."""
    error = context.get("exception")
    if not (isinstance(error, OSError) and error.errno in SCARCE):
        loop.default_exception_handler(context)
