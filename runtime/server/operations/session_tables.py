"""Collect what is known of the sessions in memory: by the sessions, the policy and the registry.

Each of them returns values, which are compared here.  Nothing waits for a step or a round, so that
values of one answer may be of slightly different moments.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from splitonnx.names import SHARE, STEP_PHASES
from splitonnx.runtime.server.operations.session_statuses import SessionStatus
from splitonnx.runtime.server.policies.tasks import MemberReport
from splitonnx.runtime.server.registries import Registry
from splitonnx.runtime.wire.session_lists import (
    MOST_OWNER,
    MOST_SESSIONS,
    Activity,
    SessionEntry,
    SessionList,
)

SHORT = 8
"""Digits of a session's ID that whoever shows no token sees.

Without tokens, whoever knows an ID may continue the session.
"""


@dataclass(frozen=True, kw_only=True)
class _Known:
    """What is known of one session; ``left`` is when its last connection ended, if it has none."""

    status: SessionStatus
    member: MemberReport
    left: float | None


def list_sessions(
    registry: Registry, now: float, *, whole_ids: bool = True, most: int = MOST_SESSIONS
) -> SessionList:
    """List the sessions in a registry's memory at the time ``now`` of a monotonic clock.

    At most ``most`` sessions are listed, those with a connection first.  Without ``whole_ids``,
    only the first digits of each ID are listed.
    """
    policy = registry.policy
    terms, members, left = policy.terms(), policy.report_members(), registry.list_left()
    found = [
        _Known(status=status, member=members[status.id], left=left.get(status.id))
        for status in (session.status for session in registry.sessions)
        if status.id in members  # the others are leaving the memory
    ]
    listed = _choose(found, most)
    furthest = max((known.status.step for known in found), default=0)
    return SessionList(
        policy=terms.policy,
        rounds=policy.report().closed if terms.local_steps else None,
        sessions=tuple(_describe(known, furthest, now, whole_ids=whole_ids) for known in listed),
        left_out=len(found) - len(listed),
    )


def _choose(found: list[_Known], most: int) -> list[_Known]:
    """Choose the sessions with a connection, and those that left last; keep the order."""
    if len(found) <= most:
        return found
    absent: Mapping[str, float] = {k.status.id: k.left for k in found if k.left is not None}
    present = [known.status.id for known in found if known.left is None]
    chosen = {*[*present, *sorted(absent, key=absent.__getitem__, reverse=True)][:most]}
    return [known for known in found if known.status.id in chosen]


def _describe(known: _Known, furthest: int, now: float, *, whole_ids: bool) -> SessionEntry:
    status, member = known.status, known.member
    return SessionEntry(
        session=status.id if whole_ids else status.id[:SHORT],
        owner=status.owner[:MOST_OWNER],
        step=status.step,
        version=member.version,
        round=member.round,
        activity=_find_activity(status, member),
        steps_behind=furthest - status.step,
        rounds_behind=member.rounds_behind,
        seconds_since_left=_measure(known.left, now),
        seconds_since_message=_measure(status.received_at, now),
        bytes_up=status.bytes_up,
        bytes_down=status.bytes_down,
        is_saved=status.is_saved,
    )


def _find_activity(status: SessionStatus, member: MemberReport) -> Activity:
    if status.open_phases & STEP_PHASES:
        return "training"
    if member.is_waiting:
        return "waiting"
    return "predicting" if status.open_phases - {SHARE} else "idle"


def _measure(earlier: float | None, now: float) -> float | None:
    """Return the seconds since a time, which another thread may have noted after ``now``."""
    return None if earlier is None else round(max(0.0, now - earlier), 3)
