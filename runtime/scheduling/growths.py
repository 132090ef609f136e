"""How much memory tasks came to need after their first message, to reserve it at once next time.

Some sizes are known only from a task's later messages, so its memory is not known when it begins.
A client's tasks are much alike, so the next task reserves what earlier ones came to need.  Without
that, a task could be interrupted while others hold the remaining memory, begin again with as little
as before, and be interrupted again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import NamedTuple

_MOST_KINDS = 256
"""Kinds of one user's tasks that are remembered; the one longest without a task is forgotten."""
_MOST_USERS = 256
"""Users of whom something is remembered; one who is gone is forgotten first."""
_DECAY = 16
"""A task's unneeded memory, divided by this, is subtracted from the remembered size."""


class TaskKind(NamedTuple):
    """Tasks that are taken to be alike; ``first`` is the bytes that the first message needs."""

    user: Hashable
    phase: str
    first: int


class Growths:
    """The peak memory that tasks of each kind needed recently, in bytes.

    A kind belongs to one user, so nobody makes another user's tasks wait for more memory.  Each
    user may store the same number of kinds, so no user can push out another user's kinds.  If there
    are too many users, those for whom ``is_there`` is false are forgotten first, and then those
    that had no task for longest.
    """

    def __init__(self, is_there: Callable[[Hashable], bool] = lambda _: True) -> None:
        self._is_there = is_there
        self._most: OrderedDict[Hashable, OrderedDict[TaskKind, int]] = OrderedDict()

    def foresee(self, kind: TaskKind) -> int:
        """Return the bytes that a task of a kind will need, by its first message or past tasks."""
        kinds = self._most.get(kind.user)
        if kinds is None or kind not in kinds:
            return kind.first
        self._most.move_to_end(kind.user)
        kinds.move_to_end(kind)
        return kinds[kind]

    def note(self, kind: TaskKind, size: int) -> None:
        """Record that an open task of a kind needs ``size`` bytes, granted or not."""
        if size <= self.foresee(kind):
            return
        if kind.user not in self._most and len(self._most) >= _MOST_USERS:
            del self._most[self._choose_forgotten()]
        kinds = self._most.setdefault(kind.user, OrderedDict())
        self._most.move_to_end(kind.user)
        kinds[kind] = size
        if len(kinds) > _MOST_KINDS:
            kinds.popitem(last=False)

    def end(self, kind: TaskKind, size: int) -> None:
        """Record that a task of a kind is over, and that it needed ``size`` bytes.

        A task that needed less than remembered reduces the remembered size a little, so that a
        single large task does not make all later ones wait for as much.
        """
        kinds = self._most.get(kind.user)
        if kinds is None or kind not in kinds:
            return
        kinds[kind] -= -(-(kinds[kind] - size) // _DECAY)
        if kinds[kind] <= kind.first:
            del kinds[kind]
        if not kinds:
            del self._most[kind.user]

    def _choose_forgotten(self) -> Hashable:
        """Return a user who is gone, or else the one that had no task for longest."""
        gone = (user for user in self._most if not self._is_there(user))
        return next(gone, next(iter(self._most)))
