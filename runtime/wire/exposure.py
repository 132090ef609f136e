"""Safety checks for a server that can be reached from the network."""

from __future__ import annotations

import ipaddress
import logging
import ssl

from splitonnx.errors import UsageError

_logger = logging.getLogger("splitonnx.exposure")


def is_loopback(host: str) -> bool:
    """Return whether an address to listen on can be reached only from this machine."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def check_exposure(
    host: str, tokens: object | None, tls: ssl.SSLContext | None, *, insecure: bool = False
) -> None:
    """Check that a server is not open to everybody on the network; warn if it does not use TLS.

    ``host`` is the address that the server listens on.  If it can be reached only from this
    machine, the check always passes, without a warning.  ``tokens`` is ``None`` if clients do not
    need a token.  Unknown clients are also kept out if ``tls`` requires client certificates.
    ``insecure`` means that unknown clients are allowed.

    Raises:
        UsageError: ``host`` is reachable from the network, nothing keeps unknown clients out, and
            ``insecure`` is not set.
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
