"""Why a server refuses a connection, and what those are asked who decide; values alone."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import TypeAlias


class Refusal(StrEnum):
    """Why a connection was refused or ended here; few, so that they may label a metric."""

    WRONG_TOKEN = "WrongToken"
    WRONG_ORIGIN = "WrongOrigin"
    TOO_MANY_STRANGERS = "TooManyStrangers"
    TOO_MANY_CLIENTS = "TooManyClients"
    NO_TOKEN = "NoToken"
    MESSAGE_TOO_BIG = "MessageTooBig"
    MESSAGE_TOO_SLOW = "MessageTooSlow"
    TOO_MANY_FRAGMENTS = "TooManyFragments"
    BROKEN_FRAME = "BrokenFrame"
    HANDSHAKE_TOO_SLOW = "HandshakeTooSlow"
    IDLE = "Idle"
    TLS = "TlsWithoutTls"


Answer: TypeAlias = tuple[int, str, bytes]
"""HTTP status, content type, body."""
Authorize: TypeAlias = Callable[[str], str | None]
"""From a token to the name of its owner, if it has one."""
Respond: TypeAlias = Callable[[str, str | None], Answer | None]
"""From a path and the token shown, if any, to an answer; ``None`` goes on to the websocket."""
OnRefusal: TypeAlias = Callable[[Refusal, str], None]
"""Told why and whom."""
