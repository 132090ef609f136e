"""What is handed out of the states in a server's folder, and to whom."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from splitonnx.bundles import PartyBundle
from splitonnx.errors import BundleError
from splitonnx.runtime.edge.http import HttpResponse
from splitonnx.runtime.server.operations import state_files
from splitonnx.runtime.server.operations.state_files import StateFiles
from splitonnx.runtime.storage.outcome_files import OutcomeFile
from splitonnx.runtime.wire.saved_states import (
    NOT_SAVED,
    SAVED_ANEW,
    SavedState,
    StateQuery,
    decode_description,
)
from splitonnx.states import STATE, State, write_state
from tests.support import tiny
from tests.support.registries import ANN, BOB


def make_part() -> PartyBundle:
    part = tiny.split_bundle().server
    assert part is not None
    return part


def publish(folder: Path, session: str, owner: str, step: int = 3) -> None:
    part = make_part()
    state = State(tensors=part.state(), step=step, session=session, owner=owner)
    write_state(folder, state, part.manifest.digest)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_part().save(tmp_path / "server")
    publish(tmp_path / "server", ANN, "ann")
    return tmp_path / "server"


@pytest.fixture
def files(folder: Path) -> StateFiles:
    return StateFiles(folder, make_part().manifest.digest)


def describe(files: StateFiles, session: str = ANN, owner: str = "ann") -> SavedState:
    answer = files.answer(StateQuery(session=session), owner)
    assert (answer.status, answer.content_type) == (200, "application/json")
    return decode_description(answer.body)


def is_missing(answer: HttpResponse) -> bool:
    return (answer.status, answer.body) == (404, f"{NOT_SAVED}\n".encode())


def read_all(files: StateFiles, state: SavedState) -> list[bytes]:
    pieces: list[bytes] = []
    while (offset := sum(map(len, pieces))) < state.nbytes:
        query = StateQuery(session=state.session, checksum=state.checksum, offset=offset)
        answer = files.answer(query, "ann")
        assert answer.status == 200
        pieces.append(answer.body)
    return pieces


def test_a_state_is_described_and_logged(
    files: StateFiles, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        found = describe(files)
    assert (found.session, found.step, found.digest) == (ANN, 3, make_part().manifest.digest)
    assert found.nbytes == (folder / STATE).stat().st_size
    assert f"session {ANN}: step 3 is fetched by 'ann'" in caplog.text


def test_the_pieces_together_are_the_file(
    files: StateFiles, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = (folder / STATE).read_bytes()
    assert read_all(files, describe(files)) == [content]
    monkeypatch.setattr(state_files, "PIECE_BYTES", 100)
    pieces = read_all(files, describe(files))
    assert b"".join(pieces) == content
    assert {len(piece) for piece in pieces[:-1]} == {100}


def test_another_session_s_state_stays_there_when_it_is_no_longer_the_newest(
    files: StateFiles, folder: Path
) -> None:
    before = describe(files)
    publish(folder, BOB, "bob", step=9)
    assert describe(files) == before
    assert describe(files, BOB, "bob").step == 9
    assert is_missing(files.answer(StateQuery(session=BOB), "ann"))
    assert is_missing(files.answer(StateQuery(session=ANN), "bob"))
    query = StateQuery(session=ANN, checksum=before.checksum)
    assert is_missing(files.answer(query, "bob"))


@pytest.mark.parametrize("owner", ["", "bob"])
def test_a_session_without_a_state_has_none_though_the_folder_has_one(
    files: StateFiles, owner: str
) -> None:
    assert is_missing(files.answer(StateQuery(session=BOB), owner))


def test_a_state_without_an_owner_is_for_each_owner(files: StateFiles, folder: Path) -> None:
    publish(folder, BOB, "")
    for owner in ("ann", "bob", ""):
        assert describe(files, BOB, owner).session == BOB


def test_a_bundle_in_memory_has_no_states() -> None:
    files = StateFiles(None, make_part().manifest.digest)
    assert is_missing(files.answer(StateQuery(session=ANN), "ann"))


def test_pieces_of_a_state_that_was_replaced_are_gone(files: StateFiles, folder: Path) -> None:
    before = describe(files)
    publish(folder, ANN, "ann", step=4)
    for state, offset in ((before, 0), (describe(files), before.nbytes)):
        query = StateQuery(session=ANN, checksum=state.checksum, offset=offset)
        answer = files.answer(query, "ann")
        assert (answer.status, answer.body) == (410, f"{SAVED_ANEW}\n".encode())


def test_a_state_of_another_bundle_is_not_handed_out_and_the_log_says_why(
    files: StateFiles, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    other = StateFiles(folder, "0" * 64)
    answer = other.answer(StateQuery(session=ANN), "ann")
    assert answer.status == 500
    assert str(folder).encode() not in answer.body
    assert "of another bundle or version" in caplog.text


def test_a_state_that_is_cut_short_is_an_error_of_the_server(
    files: StateFiles, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def cut(file: OutcomeFile, offset: int, most: int) -> bytes:
        raise BundleError(str(folder), "it was cut short while it was read")

    monkeypatch.setattr(OutcomeFile, "read", cut)
    query = StateQuery(session=ANN, checksum=describe(files).checksum)
    answer = files.answer(query, "ann")
    assert (answer.status, b"the server's log says why" in answer.body) == (500, True)
