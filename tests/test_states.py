"""States on disk: several sessions of one server end at the same time."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from splitonnx.states import State, read_state, write_state
from tests import tiny


def test_no_outcome_is_lost_where_sessions_end_at_the_same_time(tmp_path: Path) -> None:
    server = tiny.split_bundle().server
    assert server is not None
    sessions = [f"{number:032x}" for number in range(60)]

    def publish(session: str) -> None:
        state = State(tensors=server.state(), step=int(session, 16), session=session)
        write_state(tmp_path, state, server.manifest.digest)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(publish, sessions))
    found = [read_state(tmp_path, server.manifest, session) for session in sessions]
    assert [state and (state.session, state.step) for state in found] == [
        (session, int(session, 16)) for session in sessions
    ]
