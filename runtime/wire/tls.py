"""TLS for both sides: contexts from certificate files, and readable descriptions of TLS failures.

The oldest version allowed is TLS 1.2.  The server may require client certificates (mutual TLS).
This module opens no connections.
"""

from __future__ import annotations

import os
import ssl
from pathlib import Path

from splitonnx.errors import UnusableFile, UsageError
from splitonnx.files import open_regular

MAX_FILE = 16 << 20
"""Largest certificate file in bytes.

An operating system's list of certificate authorities takes less than 1 MiB.
"""


def make_server_tls(
    certificate: str | Path, key: str | Path, *, client_authority: str | Path | None = None
) -> ssl.SSLContext:
    """Create the TLS context of a server.

    ``certificate`` is a PEM file with the server's certificate, followed by any intermediate
    certificates.  ``key`` is a PEM file with the private key, without a password.
    ``client_authority`` is a PEM file with a certificate authority; if it is given, clients must
    present a certificate that this authority signed.

    Raises:
        UnusableFile: a file is missing or not PEM, or the key does not match the certificate.
    """
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_RENEGOTIATION  # which costs a server more than who asks for it
    _load_chain(context, certificate, key)
    if client_authority is not None:
        _load_authority(context, client_authority)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def make_client_tls(
    *,
    authority: str | Path | None = None,
    certificate: str | Path | None = None,
    key: str | Path | None = None,
) -> ssl.SSLContext:
    """Create the TLS context of a client, which always checks the server's name.

    ``authority`` is a PEM file of trusted certificate authorities; by default, the operating
    system's list is used.  ``certificate`` and ``key`` are PEM files with the client's own
    certificate and private key, for servers that ask for them.

    Raises:
        UsageError: ``certificate`` is given without ``key``, or ``key`` without ``certificate``.
        UnusableFile: a file is missing or not PEM, or the key does not match the certificate.
    """
    if (certificate is None) != (key is None):
        raise UsageError("a certificate and its key go together; name both --cert and --key")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if authority is None:
        context.load_default_certs()
    else:
        _load_authority(context, authority)
    if certificate is not None and key is not None:
        _load_chain(context, certificate, key)
    return context


def describe_failure(error: ssl.SSLError) -> str | None:
    """Return a readable reason for a TLS failure, or ``None`` if the cause is not recognized."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return error.verify_message.rstrip(".")
    reason = (error.reason or "").lower().replace("_", " ")
    if "certificate required" in reason:
        return "it asks for a certificate of this side; name one with --cert and --key"
    if "alert" in reason and ("certificate" in reason or "unknown ca" in reason):
        return f"it does not accept the certificate of this side ({reason})"
    if "wrong version number" in reason:
        return "it does not speak TLS; write ws:// or start it with --tls-cert and --tls-key"
    return None


def _load_chain(context: ssl.SSLContext, certificate: str | Path, key: str | Path) -> None:
    for path in (certificate, key):
        _require_file(path)

    def refuse_password() -> str:
        raise UnusableFile(str(key), "the key is locked with a password; splitonnx takes none")

    try:
        context.load_cert_chain(certificate, key, refuse_password)
    except ssl.SSLError as error:
        reason = error.reason or ""
        if "MISMATCH" in reason:
            raise UnusableFile(
                str(key), f"this is not the private key of the certificate in {certificate}"
            ) from error
        raise UnusableFile(
            f"{certificate}, {key}", "these are not a certificate and its private key in PEM"
        ) from error


def _load_authority(context: ssl.SSLContext, path: str | Path) -> None:
    _require_file(path)
    try:
        context.load_verify_locations(path)
    except ssl.SSLError as error:
        raise UnusableFile(str(path), "no certificate of an authority in PEM") from error


def _require_file(path: str | Path) -> None:
    try:
        os.close(open_regular(path, MAX_FILE))
    except OSError as error:
        raise UnusableFile(str(path), error.strerror or str(error)) from error
