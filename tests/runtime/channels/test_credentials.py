"""How a client shows who it is: what is checked before anything is sent."""

from __future__ import annotations

import logging
import ssl

import pytest

from splitonnx.errors import UsageError
from splitonnx.runtime.channels.credentials import Credentials, check_url


@pytest.fixture
def tls() -> ssl.SSLContext:
    return ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)


def test_a_token_is_not_printed() -> None:
    credentials = Credentials(token="open sesame")
    assert "sesame" not in repr(credentials)
    assert credentials.token == "open sesame"


@pytest.mark.parametrize("size", [0, -1])
def test_a_limit_that_lets_nothing_through_is_refused(size: int) -> None:
    with pytest.raises(UsageError, match=f"message_bytes must be positive, not {size}"):
        Credentials(message_bytes=size)


@pytest.mark.parametrize("url", ["ws://[::1", "ws://[not-an-address]:1"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_url(url, Credentials())
    assert url in str(caught.value)


@pytest.mark.parametrize("url", ["wss://ann:secret@lab.example", "wss://ann@lab.example"])
def test_names_and_passwords_in_an_address_are_refused_and_not_repeated(url: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_url(url, Credentials())
    assert "ann" not in str(caught.value)
    assert "secret" not in str(caught.value)


def test_certificates_need_an_address_with_tls(tls: ssl.SSLContext) -> None:
    check_url("wss://lab.example", Credentials(tls=tls))
    with pytest.raises(UsageError, match="wss://"):
        check_url("ws://lab.example", Credentials(tls=tls))


@pytest.mark.parametrize(
    ("url", "token", "is_warned"),
    [
        ("ws://lab.example:8765", "t", True),
        ("ws://192.168.0.7:8765", "t", True),
        ("ws://127.0.0.1.evil.example", "t", True),
        ("ws://lab.example:8765", None, False),
        ("wss://lab.example:8765", "t", False),
        ("ws://127.0.0.1:8765", "t", False),
        ("ws://[::1]:8765", "t", False),
        ("ws://localhost", "t", False),
    ],
)
def test_a_token_that_travels_in_the_clear_is_warned_of_and_not_logged(
    url: str, token: str | None, is_warned: bool, caplog: pytest.LogCaptureFixture
) -> None:
    secret = None if token is None else "open-sesame"
    with caplog.at_level(logging.WARNING):
        check_url(url, Credentials(token=secret))
    assert bool(caplog.records) is is_warned
    assert "open-sesame" not in caplog.text
