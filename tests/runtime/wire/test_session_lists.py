"""The list of a server's sessions as JSON: the same when read, and nothing else is one."""

from __future__ import annotations

import json

import pytest

from splitonnx.json_errors import JSON_ERRORS
from splitonnx.runtime.wire.session_lists import decode_list, encode_list
from tests.support.session_lists import make_entry, make_list

LIST = make_list(make_entry(), make_entry(owner="bö\x1b", round=3, rounds_behind=1), left_out=7)


def test_a_list_is_read_as_it_was_written() -> None:
    assert decode_list(encode_list(LIST)) == LIST


def test_what_a_later_version_adds_is_ignored() -> None:
    later = json.loads(encode_list(LIST))
    later["mood"] = later["sessions"][0]["mood"] = "good"
    assert decode_list(json.dumps(later).encode()) == LIST


@pytest.mark.parametrize("name", ["step", "bytes_up", "seconds_since_message"])
def test_nothing_is_less_than_none(name: str) -> None:
    wrong = json.loads(encode_list(LIST))
    wrong["sessions"][0][name] = -1
    with pytest.raises(JSON_ERRORS):
        decode_list(json.dumps(wrong).encode())


@pytest.mark.parametrize("content", [b"", b"{}", b"[" * 100_000, b'"\xff"', b"<html>"])
def test_what_is_not_a_list_is_refused(content: bytes) -> None:
    with pytest.raises(JSON_ERRORS):
        decode_list(content)
