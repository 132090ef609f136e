"""Whatever text a decoder of msgspec refuses, the exception is one of those that callers expect."""

from __future__ import annotations

import json
import struct

import msgspec
import pytest

from splitonnx.errors import FormatError
from splitonnx.json_errors import JSON_ERRORS
from splitonnx.manifests import BundleManifest, PartyManifest, decode_manifest
from splitonnx.messages import _FIELD, decode_message

NESTED = "[" * 5000 + "]" * 5000


class Point(msgspec.Struct):
    """Something to decode."""

    x: int


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"{}",
        b'{"x": "one"}',
        b"\xff",
        b'{"\xff": 1}',
        b'{"x": 1, "y": %b}' % NESTED.encode(),
    ],
)
def test_bytes_that_are_not_the_expected_json_end_in_one_of_them(text: bytes) -> None:
    with pytest.raises(JSON_ERRORS):
        msgspec.json.Decoder(Point).decode(text)


@pytest.mark.parametrize("text", [f'{{"type":"Hello","y":{NESTED}}}', f'{{"type":{NESTED}}}'])
def test_a_message_nested_too_deeply_is_no_message(text: str) -> None:
    header = json.dumps({"__metadata__": {_FIELD: text}}).encode()
    with pytest.raises(FormatError, match="not a message"):
        decode_message(struct.pack("<Q", len(header)) + header)


@pytest.mark.parametrize("kind", [BundleManifest, PartyManifest])
def test_a_manifest_nested_too_deeply_is_no_manifest(kind: type) -> None:
    with pytest.raises(FormatError, match="not a manifest"):
        decode_manifest(f'{{"y": {NESTED}}}'.encode(), kind, "manifest.json")
