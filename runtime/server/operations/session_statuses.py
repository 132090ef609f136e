"""What a session is doing, as one value that may be read in any thread."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class SessionStatus:
    """What a session is doing; :class:`~sessions.Session` has attributes of the same names.

    ``step`` is the client's step, and ``received_at`` is when its newest message arrived, in
    seconds of a monotonic clock, or ``None`` before the first one.  Bytes are of whole messages,
    whether or not they arrive, since the session is in memory.
    """

    id: str
    owner: str
    step: int
    open_phases: frozenset[str]
    is_saved: bool
    bytes_up: int
    bytes_down: int
    received_at: float | None
