"""TLS with real certificates: who is trusted, and what is said where nobody is."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path

import numpy as np
import pytest

from splitonnx.codecs import encode_tensors
from splitonnx.errors import ConnectionLost, ProtocolError, UntrustedPeer, UnusableFile, UsageError
from splitonnx.runtime.channels.credentials import Credentials
from splitonnx.runtime.channels.websockets import connect
from splitonnx.runtime.edge import listeners
from splitonnx.runtime.edge.http import Refusal
from splitonnx.runtime.limits import Limits
from splitonnx.runtime.wire.tls import make_client_tls, make_server_tls
from tests.support.certificates import Files
from tests.support.echoes import Echo, dial, know_sesame, read_to_end
from tests.support.event_loops import ON_BOTH_LOOPS

pytestmark = ON_BOTH_LOOPS


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    return Files(tmp_path_factory.mktemp("certificates"))


def greet(echo: Echo, credentials: Credentials) -> bytes:
    transport = connect(echo.url, credentials=credentials)
    try:
        transport.send([b"hello"])
        return bytes(transport.receive())
    finally:
        transport.close()


def test_a_server_that_the_authority_signed_is_trusted(files: Files) -> None:
    with Echo(tls=make_server_tls(*files.server), authorize=know_sesame) as echo:
        trusting = Credentials(token="open sesame", tls=make_client_tls(authority=files.authority))
        assert echo.url.startswith("wss://")
        assert greet(echo, trusting) == b"hello"


def test_a_large_message_arrives_whole_there_and_back(files: Files) -> None:
    sent = encode_tensors({"x": np.random.default_rng(0).standard_normal(1 << 20)})  # 8 MiB
    with Echo(tls=make_server_tls(*files.server)) as echo:
        trusting = Credentials(tls=make_client_tls(authority=files.authority))
        transport = connect(echo.url, credentials=trusting)
        for _ in range(3):
            transport.send(sent)
            assert transport.receive() == b"".join(sent)
        transport.close()


def test_a_server_of_another_authority_is_not(files: Files) -> None:
    with Echo(tls=make_server_tls(*files.server)) as echo:
        with pytest.raises(UntrustedPeer, match="unable to get local issuer"):
            greet(echo, Credentials(tls=make_client_tls(authority=files.other_authority)))
        with pytest.raises(UntrustedPeer, match=r"self.signed|local issuer"):
            greet(echo, Credentials())  # the system's authorities


def test_a_server_of_another_name_or_out_of_date_is_not(files: Files) -> None:
    trusting = Credentials(tls=make_client_tls(authority=files.authority))
    for own, reason in [(files.elsewhere, r"mismatch.*127\.0\.0\.1"), (files.expired, "expired")]:
        with (
            Echo(tls=make_server_tls(*own)) as echo,
            pytest.raises(UntrustedPeer, match=reason),
        ):
            greet(echo, trusting)


def test_with_mutual_tls_a_client_needs_a_certificate_of_the_authority(files: Files) -> None:
    tls = make_server_tls(*files.server, client_authority=files.authority)
    with Echo(tls=tls) as echo:
        for own in (None, files.foreign):
            certificate, key = own or (None, None)
            context = make_client_tls(authority=files.authority, certificate=certificate, key=key)
            with pytest.raises(ProtocolError, match="certificate of this side"):
                greet(echo, Credentials(tls=context))
            assert echo.owners.empty()
        certificate, key = files.client
        context = make_client_tls(authority=files.authority, certificate=certificate, key=key)
        assert greet(echo, Credentials(tls=context)) == b"hello"
        assert echo.owners.get_nowait() == "ana"


def test_tls_where_the_other_side_has_none_is_told(files: Files) -> None:
    trusting = Credentials(tls=make_client_tls(authority=files.authority))
    with Echo() as echo, pytest.raises(ProtocolError, match="does not speak TLS"):
        connect(echo.url.replace("ws://", "wss://"), credentials=trusting)
    with Echo(tls=make_server_tls(*files.server)) as echo, pytest.raises(ConnectionLost):
        connect(echo.url.replace("wss://", "ws://"))
    with pytest.raises(UsageError, match="without TLS"):
        connect("ws://127.0.0.1:1", credentials=trusting)


def test_an_unfinished_tls_handshake_has_little_time(files: Files) -> None:
    limits = Limits(handshake_seconds=0.2)
    tls = make_server_tls(*files.server)
    with Echo(tls=tls, limits=limits) as echo, dial(echo.port) as connection:
        connection.sendall(b"\x16\x03\x01")
        assert read_to_end(connection) == b""


def test_of_too_many_unfinished_tls_handshakes_the_oldest_go_once_they_had_some_time(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listeners, "GRACE_SECONDS", 0.2)
    tls = make_server_tls(*files.server)
    trusting = Credentials(tls=make_client_tls(authority=files.authority))
    with Echo(tls=tls, limits=Limits(unauthenticated=2)) as echo, ExitStack() as crowd:
        first = crowd.enter_context(dial(echo.port))
        first.sendall(b"\x16")
        newest = [crowd.enter_context(dial(echo.port)) for _ in range(20)][-1]
        assert read_to_end(newest) == b""
        for _ in range(1000):  # as a client does, which is told of a lost connection
            with suppress(ConnectionLost):
                assert greet(echo, trusting) == b"hello"
                break
        assert read_to_end(first) == b""
        echo.expect(Refusal.TOO_MANY_UNAUTHENTICATED)


def test_files_that_are_no_certificates_are_told(files: Files, tmp_path: Path) -> None:
    junk = tmp_path / "junk.pem"
    junk.write_text("no PEM")
    missing = tmp_path / "missing.pem"
    certificate, key = files.server
    _, other_key = files.client
    attempts: list[tuple[Callable[[], ssl.SSLContext], str]] = [
        (lambda: make_server_tls(missing, key), "missing.pem: No such file"),
        (lambda: make_server_tls(certificate, missing), "missing.pem: No such file"),
        (lambda: make_server_tls(junk, key), "not a certificate and its private key"),
        (lambda: make_server_tls(certificate, junk), "not a certificate and its private key"),
        (lambda: make_server_tls(certificate, other_key), "not the private key"),
        (lambda: make_server_tls(certificate, key, client_authority=junk), "no certificate of an"),
        (lambda: make_client_tls(authority=missing), "missing.pem: No such file"),
        (lambda: make_client_tls(authority=junk), "no certificate of an authority"),
    ]
    for make, reason in attempts:
        with pytest.raises(UnusableFile, match=reason):
            make()
    with pytest.raises(UsageError, match="go together"):
        make_client_tls(certificate=certificate)


def test_a_key_with_a_password_is_told_rather_than_asked_for(files: Files, tmp_path: Path) -> None:
    from cryptography.hazmat.primitives.serialization import (
        BestAvailableEncryption,
        Encoding,
        PrivateFormat,
        load_pem_private_key,
    )

    certificate, key = files.server
    locked = tmp_path / "locked.pem"
    loaded = load_pem_private_key(key.read_bytes(), None)
    encryption = BestAvailableEncryption(b"secret")
    locked.write_bytes(loaded.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, encryption))
    with pytest.raises(UnusableFile, match="password"):
        make_server_tls(certificate, locked)
