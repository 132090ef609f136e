"""The files of outcomes as bytes: which file it is, and what becomes of one that changes."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from splitonnx.errors import BundleError
from splitonnx.runtime.storage import outcome_files
from splitonnx.runtime.storage.outcome_files import OutcomeFile, opening_outcome
from splitonnx.states import OUTCOMES, STATE, State, write_state
from tests.support import tiny

ANN, BOB = "a" * 32, "b" * 32
PARTY = tiny.split_bundle().client


def publish(folder: Path, session: str, step: int = 3) -> bytes:
    tensors = {name: array + step for name, array in PARTY.state().items()}
    write_state(folder, State(tensors=tensors, step=step, session=session), PARTY.manifest.digest)
    return (folder / STATE).read_bytes()


def read(folder: Path, session: str) -> bytes | None:
    with opening_outcome(folder, session) as found:
        if found is None:
            return None
        assert found.metadata["session"] == session
        return found.read(0, found.nbytes)


def test_an_outcome_is_found_as_the_newest_and_among_earlier_ones(tmp_path: Path) -> None:
    assert read(tmp_path, ANN) is None
    first = publish(tmp_path, ANN)
    assert read(tmp_path, ANN) == first
    second = publish(tmp_path, BOB)
    assert (tmp_path / OUTCOMES / f"{ANN}.safetensors").is_file()
    assert (read(tmp_path, ANN), read(tmp_path, BOB)) == (first, second)
    for other in ("c" * 32, "", f"../{OUTCOMES}/{ANN}"):
        assert read(tmp_path, other) is None


def test_a_piece_ends_with_the_file(tmp_path: Path) -> None:
    content = publish(tmp_path, ANN)
    with opening_outcome(tmp_path, ANN) as found:
        assert found is not None
        assert found.nbytes == len(content)
        assert found.read(10, 20) == content[10:30]
        assert found.read(len(content) - 5, 20) == content[-5:]


def test_it_stays_the_same_file_while_another_gets_its_name(tmp_path: Path) -> None:
    content = publish(tmp_path, ANN)
    with opening_outcome(tmp_path, ANN) as found:
        publish(tmp_path, BOB, step=9)
        publish(tmp_path, ANN, step=10)
        assert found is not None
        assert found.read(0, found.nbytes) == content


@pytest.mark.skipif(os.name == "nt", reason="open files cannot be cut there")
def test_a_file_that_is_cut_short_is_an_error_and_ends_no_process(tmp_path: Path) -> None:
    content = publish(tmp_path, ANN)
    with opening_outcome(tmp_path, ANN) as found:
        assert found is not None
        os.truncate(tmp_path / STATE, len(content) // 2)
        with pytest.raises(BundleError, match="cut short"):
            found.read(0, len(content))
    os.truncate(tmp_path / STATE, 4)
    assert read(tmp_path, ANN) is None


def test_an_outcome_that_is_moved_back_between_two_looks_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(tmp_path, ANN)
    publish(tmp_path, BOB)
    looks: list[str] = []
    look = outcome_files._open

    def publish_meanwhile(path: Path) -> OutcomeFile | None:
        looks.append(path.name)
        if len(looks) == 2:
            publish(tmp_path, ANN, step=4)
        return look(path)

    monkeypatch.setattr(outcome_files, "_open", publish_meanwhile)
    with opening_outcome(tmp_path, ANN) as found:
        assert found is not None
        assert found.metadata["step"] == "4"
    assert looks == [STATE, f"{ANN}.safetensors", STATE]


def test_what_is_no_file_of_tensors_is_no_outcome(tmp_path: Path) -> None:
    (tmp_path / STATE).write_bytes(b"\xff" * 100)
    assert read(tmp_path, ANN) is None
    (tmp_path / STATE).unlink()
    (tmp_path / STATE).mkdir()
    with pytest.raises(BundleError, match="cannot be read"):
        read(tmp_path, ANN)
