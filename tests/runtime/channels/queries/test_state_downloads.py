"""A state is downloaded whole, or nothing of it is used: what a server may not do."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import numpy as np
import pytest

from splitonnx.bundles import Bundle
from splitonnx.checksums import encode_with_checksum
from splitonnx.errors import ConnectionLost, StateNotFetched, UsageError
from splitonnx.runtime.channels.credentials import Credentials
from splitonnx.runtime.channels.queries import state_downloads
from splitonnx.runtime.channels.queries.server_parts import collect
from splitonnx.runtime.channels.queries.state_downloads import (
    TRIES,
    describe_state,
    download_state,
)
from splitonnx.runtime.wire.saved_states import (
    NOT_SAVED,
    SAVED_ANEW,
    SavedState,
    decode_description,
    encode_description,
    read_path,
)
from splitonnx.states import FORMAT, STATE, State, write_state
from tests.support import tiny
from tests.support.plain_answers import Asked, PlainAnswer, answering

NOBODY = Credentials()
SESSION = "0a" * 16
BUNDLE = tiny.split_bundle()
PIECE = 100
"""Bytes of a piece in these tests."""

Arrays = dict[str, np.ndarray]


def make_trained() -> Bundle:
    """Return the bundle with a client's part after three steps."""
    client = BUNDLE.client.with_state(State(tensors=BUNDLE.client.state(), step=3, session=SESSION))
    return Bundle(
        manifest=BUNDLE.manifest,
        parties={**BUNDLE.parties, "client": client},
        skeleton=BUNDLE.skeleton,
    )


def read_arrays() -> Arrays:
    assert BUNDLE.server is not None
    return {name: array + 1 for name, array in BUNDLE.server.state().items()}


def write(folder: Path, arrays: Arrays, *, step: int = 3) -> bytes:
    write_state(folder, State(tensors=arrays, step=step, session=SESSION), BUNDLE.manifest.digest)
    return (folder / STATE).read_bytes()


@pytest.fixture
def content(tmp_path: Path) -> bytes:
    return write(tmp_path, read_arrays())


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state_downloads, "PIECE_BYTES", PIECE)


def describe(content: bytes) -> SavedState:
    return SavedState(
        digest=BUNDLE.manifest.digest,
        session=SESSION,
        step=3,
        nbytes=len(content),
        checksum="c" * 64,
    )


class Liar:
    """Tells the truth, but for the changes to the description and to pieces by their offset."""

    def __init__(self, content: bytes, **changes: object) -> None:
        self.content = content
        self.description = encode_description(msgspec.structs.replace(describe(content), **changes))
        self.pieces: dict[int, Iterator[PlainAnswer]] = {}

    def __call__(self, path: str) -> PlainAnswer:
        query = read_path(path)
        assert query is not None
        if not query.checksum:
            return PlainAnswer(content=self.description)
        truth = PlainAnswer(content=self.content[query.offset : query.offset + PIECE])
        return next(self.pieces.get(query.offset, iter(())), truth)


def download(url: str, content: bytes, waits: list[float] | None = None) -> bytes:
    file = io.BytesIO()
    waited = [] if waits is None else waits
    state = describe_state(url, NOBODY, SESSION)
    download_state(url, NOBODY, state, file, most=len(content), wait=waited.append)
    return file.getvalue()


def collect_from(url: str) -> Bundle:
    return collect(make_trained(), url, credentials=NOBODY)


def test_the_file_is_put_together_from_its_pieces(content: bytes) -> None:
    with answering(Liar(content)) as (url, asked):
        assert download(url, content) == content
    offsets = [query.offset for path, _ in asked if (query := read_path(path)) and query.checksum]
    assert offsets == list(range(0, len(content), PIECE))
    assert len(offsets) > 2


def test_a_piece_that_was_lost_is_asked_for_again(content: bytes) -> None:
    liar, waits = Liar(content), []  # type: ignore[var-annotated]
    busy = PlainAnswer(content=b"too many ask", status=503)
    short = PlainAnswer(content=b"abc", headers={"Content-Length": str(PIECE)})
    liar.pieces[PIECE] = iter([busy, short, busy])
    with answering(liar) as (url, _):
        assert download(url, content, waits) == content
    assert len([seconds for seconds in waits if seconds]) == 3


def test_a_server_that_stays_full_is_given_up(content: bytes) -> None:
    liar, waits = Liar(content), []  # type: ignore[var-annotated]
    liar.pieces[0] = iter([PlainAnswer(content=b"full", status=503)] * TRIES)
    with answering(liar) as (url, asked), pytest.raises(ConnectionLost, match="HTTP 503: full"):
        download(url, content, waits)
    assert len(asked) == 1 + TRIES
    assert len(waits) == TRIES


def test_an_answer_that_is_always_cut_short_is_given_up(content: bytes) -> None:
    liar = Liar(content)
    short = PlainAnswer(content=content[:50], headers={"Content-Length": str(PIECE)})
    liar.pieces[0] = iter([short] * TRIES)
    with answering(liar) as (url, _), pytest.raises(ConnectionLost, match="broke off"):
        download(url, content)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (PlainAnswer(content=bytes(PIECE - 1)), "at byte 100 it sent 99 bytes in place of 100"),
        (PlainAnswer(content=b""), "at byte 100 it sent 0 bytes in place of 100"),
        (PlainAnswer(content=bytes(PIECE + 1)), "over 100 bytes"),
        (PlainAnswer(content=bytes(PIECE * 900)), "over 100 bytes"),
        (PlainAnswer(content=SAVED_ANEW.encode(), status=410), "published a newer state meanwhile"),
        (PlainAnswer(content=b"", status=302, headers={"Location": "/"}), "is not followed"),
    ],
)
def test_a_piece_of_another_size_ends_the_download(
    content: bytes, answer: PlainAnswer, reason: str
) -> None:
    liar = Liar(content)
    liar.pieces[PIECE] = iter([answer])
    with answering(liar) as (url, _), pytest.raises(StateNotFetched, match=reason):
        download(url, content)


def test_a_state_that_would_be_larger_than_the_bundle_s_is_not_begun(content: bytes) -> None:
    with answering(Liar(content, nbytes=1 << 40)) as (url, asked):
        with pytest.raises(StateNotFetched, match=r"1099511627776 bytes, and .* at most"):
            collect_from(url)
        assert len(asked) == 1


def test_less_is_taken_than_one_message_may_have_or_it_is_said(content: bytes) -> None:
    with answering(Liar(content)) as (url, asked):
        few = Credentials(message_bytes=PIECE - 1)
        with pytest.raises(UsageError, match=f"over --max-message-bytes {PIECE - 1}"):
            describe_state(url, few, SESSION)
        assert asked == []


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (PlainAnswer(content=b"<html>"), "does not describe a state"),
        (PlainAnswer(content=b'{"step": -1}'), "does not describe a state"),
        (PlainAnswer(content=b" " * 5000), "over 4096 bytes"),
        (PlainAnswer(content=b"", status=426), "earlier version, so update it"),
        (PlainAnswer(content=NOT_SAVED.encode(), status=404), "no finished training"),
    ],
)
def test_what_does_not_describe_a_state_is_said(answer: PlainAnswer, reason: str) -> None:
    with answering(lambda _: answer) as (url, _), pytest.raises(StateNotFetched, match=reason):
        describe_state(url, NOBODY, SESSION)


def test_a_description_of_another_session_is_refused(content: bytes) -> None:
    with (
        answering(Liar(content, session="1" * 32)) as (url, _),
        pytest.raises(StateNotFetched, match="about another session"),
    ):
        describe_state(url, NOBODY, SESSION)


# --- a whole file that is not the state -----------------------------------------------------------


def refuse(content: bytes, **changes: object) -> tuple[str, Asked]:
    """Hand out a file, and return the error's text, and what was asked."""
    with answering(Liar(content, **changes)) as (url, asked):
        with pytest.raises(StateNotFetched) as raised:
            collect_from(url)
        return str(raised.value), asked


def test_what_an_honest_server_hands_out_is_used(content: bytes) -> None:
    with answering(Liar(content)) as (url, _):
        found = collect_from(url).server
    assert found is not None
    assert found.step == 3
    for name, array in read_arrays().items():
        np.testing.assert_array_equal(found.state()[name], array)


def test_a_byte_that_was_altered_is_noticed(content: bytes) -> None:
    for place in (-1, -40):
        altered = bytearray(content)
        altered[place] ^= 1
        assert "altered since it was written" in refuse(bytes(altered))[0]


def test_a_file_that_ends_early_is_noticed(content: bytes) -> None:
    for size in (0, 7, len(content) // 2, len(content) - 1):
        assert "cannot be used" in refuse(content[:size])[0]


def put_client_weight(arrays: Arrays) -> Arrays:
    return {**arrays, "W1": np.zeros((3, 4), np.float32)}


def leave_out(arrays: Arrays) -> Arrays:
    return {name: array for name, array in arrays.items() if name != "W2"}


def reshape(arrays: Arrays) -> Arrays:
    return {**arrays, "W2": arrays["W2"].reshape(2, 4)}


def retype(arrays: Arrays) -> Arrays:
    return {**arrays, "W2": arrays["W2"].astype(np.int32)}


def spoil(arrays: Arrays) -> Arrays:
    return {**arrays, "W2": np.full_like(arrays["W2"], np.nan)}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (put_client_weight, "differ in 'W1'"),
        (leave_out, "differ in 'W2'"),
        (reshape, "W2"),
        (retype, "W2"),
        (spoil, "NaN"),
    ],
)
def test_other_tensors_than_the_bundle_declares_are_refused(
    tmp_path: Path, change: Callable[[Arrays], Arrays], reason: str
) -> None:
    text, _ = refuse(write(tmp_path, change(read_arrays())))
    assert reason in text


def test_a_state_of_another_step_or_session_than_announced_is_refused(tmp_path: Path) -> None:
    assert "another state than it announced" in refuse(write(tmp_path, read_arrays(), step=4))[0]
    facts = {"format": FORMAT, "step": "3", "digest": BUNDLE.manifest.digest, "session": "1" * 32}
    other = b"".join(bytes(chunk) for chunk in encode_with_checksum(read_arrays(), facts))
    assert "another state than it announced" in refuse(other)[0]
    assert decode_description(encode_description(describe(other))).step == 3
