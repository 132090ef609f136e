"""Lists of sessions as a server sends them, without a server."""

from __future__ import annotations

from splitonnx.runtime.wire.session_lists import SessionEntry, SessionList


def make_entry(**changes: object) -> SessionEntry:
    facts = {
        "session": "0123456789abcdef" * 2,
        "owner": "ann",
        "step": 12,
        "version": 12,
        "round": None,
        "activity": "training",
        "steps_behind": 0,
        "rounds_behind": None,
        "seconds_since_left": None,
        "seconds_since_message": 1.25,
        "bytes_up": 1500,
        "bytes_down": 2_000_000,
        "is_saved": True,
    }
    return SessionEntry(**{**facts, **changes})  # type: ignore[arg-type]


def make_list(*entries: SessionEntry, left_out: int = 0) -> SessionList:
    return SessionList(policy="per-client", rounds=None, sessions=entries, left_out=left_out)
