"""Limits on the number of sessions in a server's memory, in total and per owner.

If there is no room for a new session, this module chooses a session to unload, and the registry
unloads it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from splitonnx.errors import ServerBusy


@dataclass(frozen=True, kw_only=True)
class Occupant:
    """A session that is in memory.

    ``left`` is the time when the session's last connection ended, or ``None`` while it has a
    connection.  ``is_busy`` is true if the session is already being unloaded.
    """

    name: str
    owner: str
    left: float | None = None
    is_busy: bool = False


class Capacity:
    """The capacity of a server, which determines whether there is room for another session.

    Args:
        sessions: the largest number of sessions in memory.
        sessions_per_owner: the largest number of sessions per owner.  The owner ``""`` may stand
            for many clients, so only the total limit applies to it.
        can_unload: whether sessions can be written to disk to make room.
    """

    def __init__(self, *, sessions: int, sessions_per_owner: int, can_unload: bool) -> None:
        self._most = sessions
        self._most_per_owner = sessions_per_owner
        self._can_unload = can_unload

    def find_leaving(
        self,
        owner: str,
        occupants: Sequence[Occupant],
        opening: Sequence[str],
        tried: Collection[str],
    ) -> Occupant | None:
        """Choose which session to unload so that ``owner`` can open another session.

        ``occupants`` lists the sessions in memory, and ``opening`` lists the owners of sessions
        that are being opened.  ``tried`` contains the names of the sessions that were already
        chosen to make room for the new session; they are not chosen again.

        Returns:
            The session to unload, or ``None`` if there is room.  If the session is already being
            unloaded, the caller only has to wait until that is done.

        Raises:
            ServerBusy: no session can be unloaded.
        """
        own = [occupant for occupant in occupants if occupant.owner == owner]
        if owner and len(own) + opening.count(owner) >= self._most_per_owner:
            return self._choose(own, tried, f"{self._most_per_owner} sessions of one token")
        if len(occupants) + len(opening) >= self._most:
            return self._choose(occupants, tried, f"{self._most} sessions")
        return None

    def _choose(
        self, occupants: Sequence[Occupant], tried: Collection[str], limit: str
    ) -> Occupant:
        """Choose the session that has been without a connection longest, or one being unloaded."""
        untried = [occupant for occupant in occupants if occupant.name not in tried]
        idle = [o for o in untried if o.left is not None and not o.is_busy]
        if idle and self._can_unload:
            return min(idle, key=lambda occupant: occupant.left or 0.0)
        for occupant in untried:
            if occupant.is_busy:
                return occupant
        raise ServerBusy(limit)
