"""How many sessions a server has in memory, in all and of one owner, and which leaves first.

It decides from what it is shown and changes nothing: sessions, threads and the disk are the
registry's business.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from splitonnx.errors import ServerBusy


@dataclass(frozen=True, kw_only=True)
class Occupant:
    """A session in memory.

    ``left`` is when its last connection ended, ``None`` while it has one; ``is_busy`` says that it
    is being unloaded already.
    """

    name: str
    owner: str
    left: float | None = None
    is_busy: bool = False


class Capacity:
    """Decides whether one more session has room.

    Args:
        sessions: the most sessions in memory.
        sessions_per_owner: the most of one owner; of ``""``, who may be many, as many as of all.
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
        """Choose which session is to leave, or to be waited for, before one more has room.

        ``opening`` are the owners of sessions that are about to be in memory, and ``tried`` names
        those that were chosen before for the same newcomer, in vain.

        Returns:
            ``None`` where there is room.

        Raises:
            ServerBusy: none can leave.
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
        """Choose the one that was left the longest ago, else one that is leaving already."""
        untried = [occupant for occupant in occupants if occupant.name not in tried]
        idle = [o for o in untried if o.left is not None and not o.is_busy]
        if idle and self._can_unload:
            return min(idle, key=lambda occupant: occupant.left or 0.0)
        for occupant in untried:
            if occupant.is_busy:
                return occupant
        raise ServerBusy(limit)
