"""Which web pages may connect, and which names a server answers to."""

from __future__ import annotations

import pytest

from splitonnx.errors import UsageError
from splitonnx.runtime.edge.origins import Origins, check_origins, is_fixed, strip_port
from tests.support.echoes import Echo


def test_pages_of_this_server_may_connect_and_others_may_not() -> None:
    own = Origins(frozenset({"https://lab.example"}), has_pages=True, is_locked=False)
    assert own.allow("http://127.0.0.1:8765", "127.0.0.1:8765")
    assert own.allow("https://[::1]:8765", "[::1]:8765")
    assert own.allow("http://localhost", "localhost")
    assert own.allow("https://lab.example", "127.0.0.1:8765")
    assert not own.allow("http://127.0.0.1:8766", "127.0.0.1:8765")
    assert not own.allow("http://evil.example", "127.0.0.1")
    assert not own.allow("null", "")
    assert not own.allow("null", None)
    assert not own.allow("http://127.0.0.1@evil.example", "127.0.0.1@evil.example")


def test_a_name_may_be_anybody_s_unless_tokens_or_tls_keep_it_out() -> None:
    rebound = "http://rebound.example:8765", "rebound.example:8765"
    assert not Origins(frozenset(), has_pages=True, is_locked=False).allow(*rebound)
    assert Origins(frozenset(), has_pages=True, is_locked=True).allow(*rebound)
    assert not Origins(frozenset(), has_pages=False, is_locked=True).allow(*rebound)


def test_the_name_that_a_server_listens_on_is_its_own() -> None:
    own = Origins(frozenset(), has_pages=False, is_locked=False, host="gpu-box.lan")
    assert own.answers_to("gpu-box.lan:8765")
    assert own.answers_to("GPU-box.lan")
    assert own.answers_to(None)  # no browser
    assert not own.answers_to("gpu-box.lan.evil.example")


@pytest.mark.parametrize("origin", ["lab.example", "https://lab.example/page", "*", ""])
def test_what_is_no_origin_cannot_be_allowed(origin: str) -> None:
    with pytest.raises(UsageError, match="not an origin"), Echo(origins=[origin]):
        pass


@pytest.mark.parametrize(
    ("host", "is_address"),
    [
        ("127.0.0.1:8765", True),
        ("192.168.0.7", True),
        ("[::1]:8765", True),
        ("localhost:1", True),
        ("LOCALHOST", True),
        ("lab.example", False),
        ("127.0.0.1.evil.example", False),
        ("localhost.evil.example", False),
        ("", False),
    ],
)
def test_an_address_is_told_from_a_name_that_the_dns_may_turn(host: str, is_address: bool) -> None:
    assert is_fixed(host) is is_address


def test_a_port_belongs_to_no_name() -> None:
    assert strip_port("Lab.Example:8765") == "lab.example"
    assert strip_port("[::1]:80") == "[::1]"
    assert strip_port("lab.example:") == "lab.example"
    assert strip_port("[::1]") == "[::1]"


def test_a_server_answers_to_the_names_of_the_origins_that_it_lets_in() -> None:
    origins = Origins(frozenset({"https://lab.example:8443"}), has_pages=False, is_locked=False)
    assert origins.answers_to("lab.example")
    assert origins.answers_to("127.0.0.1:1")
    assert not origins.answers_to("evil.example")
    locked = Origins(frozenset(), has_pages=False, is_locked=True)
    assert locked.answers_to("evil.example")


@pytest.mark.parametrize(
    "origin", ["https://lab.example", "http://localhost:3000", "chrome-extension://abc"]
)
def test_an_origin_is_a_scheme_a_host_and_perhaps_a_port(origin: str) -> None:
    assert check_origins([origin, origin]) == {origin}


@pytest.mark.parametrize(
    "origin", ["HTTPS://lab.example", "https://ann@lab.example", "https://a b"]
)
def test_an_origin_that_no_browser_sends_is_refused_by_name(origin: str) -> None:
    with pytest.raises(UsageError) as caught:
        check_origins(["https://lab.example", origin])
    assert f"'{origin}'" in str(caught.value)
