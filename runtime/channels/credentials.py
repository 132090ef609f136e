"""How a client shows a server who it is, and whom it trusts; it opens no connection."""

from __future__ import annotations

import logging
import ssl
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from splitonnx.errors import UsageError
from splitonnx.runtime.wire.exposure import is_loopback

MESSAGE_BYTES = 256 << 20
"""Bytes of one message from a server, unless another limit is given."""

_logger = logging.getLogger("splitonnx.credentials")


@dataclass(frozen=True, kw_only=True)
class Credentials:
    """How a client shows who it is, whom it trusts, and how far.

    ``token`` goes into the request's header.  ``tls`` is for ``wss://`` addresses and defaults to
    the authorities that the operating system trusts.  ``message_bytes`` is the largest message
    that the server may send: a larger one ends the connection at its announcement.

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
    """Check a server's address against how it is to be reached; warn of a token in the clear.

    Raises:
        UsageError: it is not an address, holds a password, or certificates are given without TLS.
    """
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
    except ValueError as error:
        raise UsageError(f"'{url}' is not a websocket address: {error}") from error
    if "@" in parts.netloc:
        raise UsageError("leave names and passwords out of the server's address; use a token")
    if credentials.tls is not None and parts.scheme != "wss":
        raise UsageError(f"'{url}' is without TLS; write wss:// or leave the certificates out")
    if credentials.token is not None and parts.scheme == "ws" and not is_loopback(host):
        _logger.warning("no TLS: the token travels to %s in the clear; use wss://", host)
