"""How messages get from a client to its server and back: one narrow interface."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from splitonnx.codecs import Chunk


class Transport(Protocol):
    """A client's connection; ``bytes_sent`` and ``bytes_received`` count whole messages."""

    bytes_sent: int
    bytes_received: int

    def send(self, chunks: Sequence[Chunk]) -> None:
        """Send chunks as one message.

        Raises:
            ConnectionLost: it cannot be sent.
        """

    def receive(self) -> Chunk:
        """Wait for the next message.

        Raises:
            ConnectionLost: none will come, or none came in time.
        """

    def close(self) -> None:
        """End the connection; may be called twice."""
