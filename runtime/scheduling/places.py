"""Places of which there are few: who has one, who has to leave, and who comes in.

Whoever has a place keeps it until somebody waits for one and ``TENURE_SECONDS`` are over.  Then
the one that has been there the longest leaves, once it is at rest.  Pure bookkeeping: what a place
is, and who is at rest, is the caller's business.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Hashable

TENURE_SECONDS = 10.0
"""Seconds that a place is kept at the least; making room costs a process's start."""


class Places:
    """``most`` places; ``clock`` gives seconds that only grow.

    ``is_there`` says whether a user may still need its place: who is gone keeps nobody waiting.
    """

    def __init__(
        self,
        most: int,
        *,
        is_there: Callable[[Hashable], bool] = lambda _: True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._most = most
        self._is_there = is_there
        self._clock = clock
        self._since: dict[Hashable, float] = {}  # the longest there comes first

    def find_leaving(
        self, waiting: Collection[Hashable], at_work: Collection[Hashable]
    ) -> Hashable:
        """Find who may begin nothing more, for those who wait; ``None`` where nobody has to leave.

        It is whom :meth:`take` would put out next.
        """
        if all(user in self._since for user in waiting) or self._find_room(at_work):
            return None
        due = self._clock() - TENURE_SECONDS
        old = [user for user, since in self._since.items() if since <= due]
        return next((user for user in old if user not in at_work), next(iter(old), None))

    def take(self, user: Hashable, at_work: Collection[Hashable]) -> bool:
        """Assign a place, evicting its holder where needed; return whether there was one."""
        if user in self._since:
            return True
        if not self._find_room(at_work):
            leaving = self.find_leaving((user,), at_work)
            if leaving is None or leaving in at_work:
                return False
            del self._since[leaving]
        self._since[user] = self._clock()
        return True

    def _find_room(self, at_work: Collection[Hashable]) -> bool:
        """Return whether a place is free, once those who are gone have none."""
        if len(self._since) >= self._most:
            gone = [u for u in self._since if u not in at_work and not self._is_there(u)]
            for user in gone:
                del self._since[user]
        return len(self._since) < self._most
