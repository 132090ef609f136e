"""Messages whose hash is not computed as long as their bytes may be kept."""

from __future__ import annotations

import hashlib

import pytest

from splitonnx.runtime.server import ledgers
from splitonnx.runtime.server.ledgers import Fingerprint, KeptContents


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Everything that was hashed."""
    found: list[bytes] = []

    class Recording:
        @staticmethod
        def sha256(content: bytes) -> object:
            found.append(bytes(content))
            return hashlib.sha256(content)

    monkeypatch.setattr(ledgers, "hashlib", Recording)
    return found


def test_a_hash_is_computed_when_it_is_asked_for_and_once(hashed: list[bytes]) -> None:
    fingerprint = Fingerprint(b"content", KeptContents())
    fingerprint.settle()
    assert hashed == []
    assert fingerprint.take() == hashlib.sha256(b"content").digest() == fingerprint.take()
    assert hashed == [b"content"]


def test_without_a_place_to_keep_them_bytes_are_hashed_at_once(hashed: list[bytes]) -> None:
    Fingerprint(b"content").settle()
    assert hashed == [b"content"]


def test_the_oldest_are_hashed_where_more_would_be_kept_than_allowed(hashed: list[bytes]) -> None:
    contents = KeptContents(most=10)
    prints = [Fingerprint(bytes([number]) * 4, contents) for number in range(4)]
    for fingerprint in prints:
        fingerprint.settle()
    assert hashed == [b"\0" * 4, b"\1" * 4]
    assert contents.size == 8
    Fingerprint(bytes(11), contents).settle()  # larger than the limit by itself
    assert hashed[2:] == [b"\2" * 4, b"\3" * 4, bytes(11)]
    assert contents.size == 0


def test_what_a_ledger_has_forgotten_does_not_count() -> None:
    contents = KeptContents(most=10)
    fingerprint = Fingerprint(bytes(8), contents)
    fingerprint.settle()
    assert contents.size == 8
    del fingerprint
    assert contents.size == 0
