"""The interface of a client's connection to a server on an event loop."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol, TypeAlias

from splitonnx.codecs import Chunk


class AsyncTransport(Protocol):
    """A connection over which a client on an event loop exchanges messages with a server."""

    async def send(self, chunks: Sequence[Chunk]) -> None:
        """Send ``chunks``, one after the other, as a single message.

        If this is cancelled, the connection is of no more use.

        Raises:
            ConnectionLost: the message cannot be sent.
        """

    async def receive(self) -> Chunk | bytearray:
        """Wait for the next message and return it; if this is cancelled, no message is lost.

        Raises:
            ConnectionLost: the connection has ended, or no message arrived in time.
        """

    async def close(self) -> None:
        """Close the connection; do nothing if it is already closed."""

    def abort(self) -> None:
        """Close the connection without waiting for anything; do nothing if it is closed."""


AsyncDial: TypeAlias = Callable[[], Awaitable[AsyncTransport]]
"""Opens a new connection, or raises ConnectionLost if that is not possible now."""
