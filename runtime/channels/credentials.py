"""A client's credentials, and the TLS settings that determine which servers it trusts.

This module does not open connections.
"""

from __future__ import annotations

import logging
import ssl
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from splitonnx.errors import UsageError
from splitonnx.runtime.wire.exposure import is_loopback

MESSAGE_BYTES = 256 << 20
"""Default limit on the size of one message from a server, in bytes."""

_logger = logging.getLogger("splitonnx.credentials")


@dataclass(frozen=True, kw_only=True)
class Credentials:
    """A client's credentials, the TLS authorities it trusts, and the largest message it accepts.

    ``token`` is sent in a header of the handshake's HTTP request.  ``tls`` is the TLS context for
    ``wss://`` addresses; without it, the client trusts the operating system's certificate
    authorities.  ``message_bytes`` limits the size of a message from the server; if a message is
    larger, the connection is closed.

    Raises:
        UsageError: ``message_bytes`` is not positive.
    """

    token: str | None = field(default=None, repr=False)
    tls: ssl.SSLContext | None = None
    message_bytes: int = MESSAGE_BYTES

    def __post_init__(self) -> None:
        if self.message_bytes < 1:
            raise UsageError(f"message_bytes must be positive, not {self.message_bytes}")


def check_url(url: str, credentials: Credentials) -> None:
    """Check a server's address, and warn if a token would be sent unencrypted to another machine.

    Raises:
        UsageError: the address is invalid, it contains a user name or password, or it does not
            begin with ``wss://`` although ``credentials`` has a TLS context.
    """
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
        _ = parts.port  # raises an error if it is not a port
    except ValueError as error:
        raise UsageError(f"'{url}' is not a websocket address: {error}") from error
    if "@" in parts.netloc:
        raise UsageError("leave names and passwords out of the server's address; use a token")
    if credentials.tls is not None and parts.scheme != "wss":
        raise UsageError(f"'{url}' is without TLS; write wss:// or leave the certificates out")
    if credentials.token is not None and parts.scheme == "ws" and not is_loopback(host):
        _logger.warning("no TLS: the token travels to %s in the clear; use wss://", host)
