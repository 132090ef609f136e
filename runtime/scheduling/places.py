"""A limited number of places: who has one, who must leave, and who gets one next.

A user keeps its place until somebody waits for one and ``TENURE_SECONDS`` have passed.  Then the
user that has had its place longest leaves, once it is not working.  Pure bookkeeping: the caller
defines what a place is, and who is working.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Hashable

TENURE_SECONDS = 10.0
"""Least seconds that a user keeps its place; freeing one costs the start of a process."""


class Places:
    """``most`` places; ``clock`` returns seconds that never decrease.

    ``is_there`` returns whether a user may still need its place; users that are gone lose it at
    once.
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
        self._since: dict[Hashable, float] = {}  # the longest holder comes first

    def find_leaving(
        self, waiting: Collection[Hashable], at_work: Collection[Hashable]
    ) -> Hashable:
        """Return the user that may begin no new work because others wait, or ``None``.

        It is the user that :meth:`take` would evict next.
        """
        if all(user in self._since for user in waiting) or self._find_room(at_work):
            return None
        due = self._clock() - TENURE_SECONDS
        old = [user for user, since in self._since.items() if since <= due]
        return next((user for user in old if user not in at_work), next(iter(old), None))

    def take(self, user: Hashable, at_work: Collection[Hashable]) -> bool:
        """Assign a place, evicting its holder if necessary; return whether a place was assigned."""
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
        """Return whether a place is free after users that are gone have lost theirs."""
        if len(self._since) >= self._most:
            gone = [u for u in self._since if u not in at_work and not self._is_there(u)]
            for user in gone:
                del self._since[user]
        return len(self._since) < self._most
