"""Questions about saved states in URL paths, and their descriptions."""

from __future__ import annotations

import msgspec
import pytest

from splitonnx.runtime.wire.saved_states import (
    DESCRIPTION_BYTES,
    SavedState,
    StateQuery,
    decode_description,
    encode_description,
    read_path,
)

SESSION, CHECKSUM = "0a" * 16, "b1" * 32
STATE = SavedState(digest="c" * 64, session=SESSION, step=12, nbytes=3000, checksum=CHECKSUM)


@pytest.mark.parametrize(
    "query",
    [
        StateQuery(session=SESSION),
        StateQuery(session=SESSION, checksum=CHECKSUM),
        StateQuery(session=SESSION, checksum=CHECKSUM, offset=8 << 40),
    ],
)
def test_a_question_is_read_from_its_own_path(query: StateQuery) -> None:
    assert read_path(query.path) == query


@pytest.mark.parametrize(
    "path",
    [
        "/states/",
        "/sessions",
        f"/states/{SESSION}/",
        f"/states/{SESSION}0",
        f"/states/{SESSION.upper()}",
        f"/states/../{SESSION}",
        f"/states/{SESSION}/{CHECKSUM}",
        f"/states/{SESSION}/{CHECKSUM}/-1",
        f"/states/{SESSION}/{CHECKSUM}/01",
        f"/states/{SESSION}/{CHECKSUM}/{'9' * 17}",
        f"/states/{SESSION}/{CHECKSUM}/٣",
        f"/states/{SESSION}?from=0",
        f"/states/{SESSION}\n",
    ],
)
def test_any_other_path_is_none(path: str) -> None:
    assert read_path(path) is None


def test_a_description_is_read_as_it_was_written_and_is_short() -> None:
    largest = msgspec.structs.replace(STATE, step=2**63 - 1, nbytes=2**63 - 1)
    for state in (STATE, largest):
        content = encode_description(state)
        assert decode_description(content) == state
        assert len(content) <= DESCRIPTION_BYTES


def test_fields_of_a_later_version_are_ignored_and_wrong_ones_refused() -> None:
    content = encode_description(STATE)
    assert decode_description(content.replace(b"{", b'{"colour":"blue",', 1)) == STATE
    with pytest.raises(msgspec.ValidationError):
        decode_description(content.replace(b"3000", b"-1"))
