"""The interface of a client's connection to a server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from splitonnx.codecs import Chunk


class Transport(Protocol):
    """A connection over which a client exchanges messages with a server."""

    @property
    def bytes_sent(self) -> int:
        """Return the number of bytes of messages that were sent."""

    @property
    def bytes_received(self) -> int:
        """Return the number of bytes of messages that were received."""

    def send(self, chunks: Sequence[Chunk]) -> None:
        """Send ``chunks``, one after the other, as a single message.

        Raises:
            ConnectionLost: the message cannot be sent.
        """

    def receive(self) -> Chunk | bytearray:
        """Wait for the next message and return it.

        Raises:
            ConnectionLost: the connection has ended, or no message arrived in time.
        """

    def close(self) -> None:
        """Close the connection; do nothing if it is already closed."""
