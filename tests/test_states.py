from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from splitonnx.errors import BundleError
from splitonnx.states import (
    STATE,
    State,
    decode_outcome,
    map_file,
    read_state,
    write_state,
)
from tests.support import tiny

SESSIONS = tuple(f"{number:032x}" for number in range(12))
PARTY = tiny.split_bundle().client


def write_outcome(folder: Path, session: str, step: int) -> None:
    tensors = {name: array + step for name, array in PARTY.state().items()}
    state = State(tensors=tensors, step=step, session=session)
    write_state(folder, state, PARTY.manifest.digest)


def read_step(folder: Path, session: str) -> int:
    state = read_state(folder, PARTY.manifest, session)
    assert state is not None
    assert state.session == session
    expected = PARTY.state()["W1"] + state.step
    np.testing.assert_array_equal(state.tensors["W1"], expected)
    return state.step


def test_sessions_that_end_at_once_each_keep_their_outcome(tmp_path: Path) -> None:
    def write(step: int) -> None:
        write_outcome(tmp_path, SESSIONS[step % len(SESSIONS)], step)

    with ThreadPoolExecutor(len(SESSIONS)) as pool:
        list(pool.map(write, range(3 * len(SESSIONS))))
    for session in SESSIONS:
        assert read_step(tmp_path, session) in range(3 * len(SESSIONS))


def test_a_file_system_without_links_keeps_outcomes_as_well(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*paths: object) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    for step, session in enumerate(SESSIONS[:3]):
        write_outcome(tmp_path, session, step)
    assert [read_step(tmp_path, session) for session in SESSIONS[:3]] == [0, 1, 2]
    write_outcome(tmp_path, SESSIONS[0], 7)
    assert read_step(tmp_path, SESSIONS[0]) == 7
    names = {path.name for path in (tmp_path / "outcomes").iterdir()}
    assert names == {f"{session}.safetensors" for session in SESSIONS[1:3]}


def test_the_content_of_an_outcome_is_decoded_wherever_it_comes_from(tmp_path: Path) -> None:
    write_outcome(tmp_path, SESSIONS[0], 5)
    content = map_file(tmp_path / STATE)
    state = decode_outcome(Path("elsewhere"), content, PARTY.manifest)
    assert (state.session, state.step) == (SESSIONS[0], 5)
    altered = bytearray(content)
    altered[-1] ^= 1
    with pytest.raises(BundleError, match=r"elsewhere.*altered"):
        decode_outcome(Path("elsewhere"), memoryview(bytes(altered)), PARTY.manifest)
