"""How a websocket ends: the close codes that both sides know, and an error from what happened."""

from __future__ import annotations

from websockets.exceptions import ConnectionClosed

from splitonnx.errors import ConnectionLost

RESTART = 1012
"""The closing code of a server that stops, and may come again."""
BUSY = 1013
"""The closing code of a server that has no room now."""
POLICY = 1008
"""The closing code of a server that wants a token, or another one."""
TOO_BIG = 1009
"""The closing code for a message over the limit of its receiver."""


def describe_loss(peer: str, error: Exception) -> ConnectionLost:
    """Describe how a connection ended: by an exception of websockets or of the system."""
    if not isinstance(error, ConnectionClosed):
        return ConnectionLost(peer, " ".join(str(error).split()) or type(error).__name__)
    close = error.rcvd or error.sent
    if close is None:
        return ConnectionLost(peer, "it closed without a word")
    return ConnectionLost(peer, f"it closed ({close})", close.code)
