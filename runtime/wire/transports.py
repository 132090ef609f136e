"""The interface of a client's connection, over which it exchanges messages with a server."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from splitonnx.codecs import Chunk


class Transport(Protocol):
    """A client's connection to a server.

    ``bytes_sent`` and ``bytes_received`` are the total sizes of the complete messages.
    """

    bytes_sent: int
    bytes_received: int

    def send(self, chunks: Sequence[Chunk]) -> None:
        """Send one message, whose content is given in chunks.

        Raises:
            ConnectionLost: the message cannot be sent.
        """

    def receive(self) -> Chunk:
        """Wait for the next message and return it.

        Raises:
            ConnectionLost: the connection has ended, or no message arrived in time.
        """

    def close(self) -> None:
        """Close the connection; may be called twice."""
