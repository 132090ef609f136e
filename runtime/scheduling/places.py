"""The sharing of a limited number of places, such as worker processes, among users.

A user (such as a token's owner) keeps its place until another user waits for a place and
``TENURE_SECONDS`` have passed.  Then the user that has had its place longest must give it up
as soon as this user is not working.  This module only keeps records: the caller defines what a
place is, and which users are working.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Hashable

TENURE_SECONDS = 10.0
"""Seconds for which a user keeps its place even if others wait.

Replacing a user costs the start of a process.
"""


class Places:
    """A limited number of places, and the users that have them.

    ``most`` is the number of places.  ``is_there`` returns whether a user may still need its place;
    a user that is gone loses its place as soon as another user needs it.  ``clock`` is a monotonic
    clock in seconds.
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
        """Return the user that should give up its place next, or ``None`` if nobody needs to.

        The caller must give this user no new work, so that :meth:`take` can evict it.  Users that
        have had their place for less than ``TENURE_SECONDS`` keep it.  ``waiting`` contains the
        users that wait for a place, and ``at_work`` contains the users that are working.
        """
        if all(user in self._since for user in waiting) or self._find_room(at_work):
            return None
        due = self._clock() - TENURE_SECONDS
        old = [user for user, since in self._since.items() if since <= due]
        return next((user for user in old if user not in at_work), next(iter(old), None))

    def take(self, user: Hashable, at_work: Collection[Hashable]) -> bool:
        """Assign a place to a user, and return whether the user has a place now.

        If no place is free, another user is evicted if possible.  ``at_work`` contains the users
        that are working and therefore cannot be evicted.
        """
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
        """Return whether a place is free, after taking back the places of users that are gone."""
        if len(self._since) >= self._most:
            gone = [u for u in self._since if u not in at_work and not self._is_there(u)]
            for user in gone:
                del self._since[user]
        return len(self._since) < self._most
