"""Listening sockets that limit how many accepted connections may be in their handshake at once.

During its TLS handshake, a connection takes about 300 KiB of memory and is known only to asyncio's
event loop.  Therefore, connections are counted from the moment they are accepted until the
handshake is complete or the socket is closed.
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
"""Most connections that the operating system queues, and that are accepted at a time."""

GRACE_SECONDS = 1.0
"""Seconds that each connection has for its handshake, however many others arrive."""
SWEEP = 64
"""Number of connections ended early after which the garbage collector runs."""

RETRY_SECONDS = 1.0
"""Seconds for which the event loop stops accepting when no file descriptor is left."""

_ABSENT = {errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT}


class HandshakeQuota:
    """A limit on how many of a server's sockets may be in their handshake at the same time.

    ``capacity`` is the limit.  If the limit is reached when a new socket arrives, ``on_full`` is
    called and the oldest socket is shut down.  However, if the oldest socket is less than
    ``GRACE_SECONDS`` old, the new socket is refused instead.  In this way, a flood of connections
    can neither keep other clients out for long nor make the server start more handshakes than it
    can finish.  ``on_scarce`` is called each time a connection cannot be accepted because too few
    file descriptors are left.
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
        """Count a newly accepted socket; return ``False`` if it must be closed instead."""
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
        """Count a connection that the server closed early; regularly run the garbage collector.

        The collector runs once every ``SWEEP`` calls.  For each such connection, asyncio leaves
        behind a reference cycle that has few objects but takes 256 KiB.  Python's automatic
        collection depends on the number of objects, not of bytes, so hundreds of such cycles would
        pile up.
        """
        self._dropped += 1
        if self._dropped % SWEEP == 0:
            gc.collect()

    def release(self, number: int) -> None:
        """Stop counting the socket with descriptor ``number``, since its handshake is complete."""
        self._waiting.pop(number, None)

    def forget(self, client: AcceptedSocket) -> None:
        """Stop counting a socket that is about to be closed."""
        if self._waiting.get(client.fileno()) is client:
            del self._waiting[client.fileno()]


class AcceptedSocket(socket.socket):
    """An accepted socket that notifies its :class:`HandshakeQuota` when it is closed."""

    quota: HandshakeQuota | None = None
    came = 0.0

    def shut_down(self) -> None:
        """Shut down the connection, so that the event loop notices and closes the socket."""
        try:
            self.shutdown(socket.SHUT_RDWR)
        except OSError:  # the other side closed first
            return

    def close(self) -> None:
        """Close the socket and stop counting it."""
        self._leave()
        super().close()

    def detach(self) -> int:
        """Stop counting the socket, since the event loop has closed its descriptor; uvloop does."""
        self._leave()
        return super().detach()

    def _leave(self) -> None:
        if self.quota is not None:
            self.quota.forget(self)
            self.quota = None


class Listener(socket.socket):
    """A listening socket that counts its accepted connections in a :class:`HandshakeQuota`."""

    quota: HandshakeQuota
    _failed = -math.inf

    def accept(self) -> tuple[socket.socket, object]:
        """Accept the next connection for which the quota has room.

        Raises:
            OSError: no file descriptor or memory is left; the event loop then pauses for a second.
            BlockingIOError: no connection is waiting, too many in a row were refused, or file
                descriptors or memory ran out a moment ago, so it is too early to try again.
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
        raise BlockingIOError  # return to the event loop, which has other work


def open_listeners(host: str, port: int, quota: HandshakeQuota) -> list[Listener]:
    """Listen on every address of ``host``, and return the listening sockets.

    An empty host means all addresses of this machine.  Port 0 means any free port; the same port is
    then used for all addresses.

    Raises:
        PortInUse: another program is using the port.
        UsageError: this machine cannot listen on the address.
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
                fault = error  # names may have IPv6 addresses even on a machine without IPv6
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
    """Handle an exception in the event loop, but ignore a lack of file descriptors or memory.

    :class:`Listener` has already reported these errors.
    """
    error = context.get("exception")
    if not (isinstance(error, OSError) and error.errno in SCARCE):
        loop.default_exception_handler(context)
