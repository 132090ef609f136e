"""Who can reach a server: loopback alone, or the network; and what must hold before the latter."""

from __future__ import annotations

import ipaddress
import logging
import ssl

from splitonnx.errors import UsageError

_logger = logging.getLogger("splitonnx.exposure")


def is_loopback(host: str) -> bool:
    """Return whether an address to listen on can be reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_exposure(
    host: str, tokens: object | None, tls: ssl.SSLContext | None, *, insecure: bool = False
) -> None:
    """Refuse to be open to the network to anyone; warn where tokens would travel in the clear.

    ``tokens`` is anything that clients have to show, ``None`` where they need nothing.  A TLS
    context that asks clients for a certificate keeps them out, too.

    Raises:
        UsageError: ``host`` can be reached from elsewhere, everybody could come in, and
            ``insecure`` was not said.
    """
    if is_loopback(host):
        return
    known = tls is not None and tls.verify_mode is ssl.CERT_REQUIRED
    if tokens is None and not known and not insecure:
        raise UsageError(
            f"anyone who reaches {host or 'this machine'} could train here: name a file of tokens "
            "with --token-file, ask for certificates with --client-ca, stay on 127.0.0.1, or say "
            "--insecure"
        )
    if tls is None:
        _logger.warning(
            "no TLS: tokens and tensors travel in the clear unless a proxy or tunnel encrypts them"
        )
