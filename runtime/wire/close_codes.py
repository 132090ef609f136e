"""WebSocket close codes that both sides use, and error texts for lost connections."""

from __future__ import annotations

from websockets.exceptions import ConnectionClosed

from splitonnx.errors import ConnectionLost

RESTART = 1012
"""Close code of a server that is stopping and may restart."""
BUSY = 1013
"""Close code of a server that is full."""
POLICY = 1008
"""Close code of a server that requires a token, or that rejected the client's token."""
TOO_BIG = 1009
"""Close code for a message that is larger than the receiver accepts."""


def describe_loss(peer: str, error: Exception) -> ConnectionLost:
    """Return an error that describes why a connection ended.

    ``error`` is an exception of the websockets library or of the operating system.
    """
    if not isinstance(error, ConnectionClosed):
        return ConnectionLost(peer, " ".join(str(error).split()) or type(error).__name__)
    close = error.rcvd or error.sent
    if close is None:
        return ConnectionLost(peer, "it closed without a word")
    return ConnectionLost(peer, f"it closed ({close})", close.code)
