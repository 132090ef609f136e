"""How a client shows a server who it is, and whom it trusts; it opens no connection."""

from __future__ import annotations

import logging
import ssl
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from splitonnx.errors import UsageError
from splitonnx.runtime.doors import is_loopback

_logger = logging.getLogger("splitonnx.accesses")


@dataclass(frozen=True, kw_only=True)
class Access:
    """How a client shows who it is, and whom it trusts.

    ``token`` goes into the request's header.  ``tls`` is for ``wss://`` addresses and defaults to
    the authorities that the operating system trusts.
    """

    token: str | None = field(default=None, repr=False)
    tls: ssl.SSLContext | None = None


def check_url(url: str, access: Access) -> None:
    """Check a server's address against how it is to be reached; warn of a token in the clear.

    Raises:
        UsageError: it is no address, holds a password, or has no TLS where certificates are given.
    """
    try:
        parts = urlsplit(url)
        host = parts.hostname or ""
    except ValueError as error:
        raise UsageError(f"'{url}' is no websocket address: {error}") from error
    if "@" in parts.netloc:
        raise UsageError("leave names and passwords out of the server's address; use a token")
    if access.tls is not None and parts.scheme != "wss":
        raise UsageError(f"'{url}' is without TLS; write wss:// or leave the certificates out")
    if access.token is not None and parts.scheme == "ws" and not is_loopback(host):
        _logger.warning("no TLS: the token travels to %s in the clear; use wss://", host)
