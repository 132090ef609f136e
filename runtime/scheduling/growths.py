"""A record of how much more memory tasks needed after their first message.

Some sizes are known only from a task's later messages, so the memory that the task needs is not
known when the task begins.  However, the tasks of one client are usually similar, so the next task
reserves as much memory as earlier tasks needed in the end.  Otherwise, a task could be interrupted
because it grows while other tasks hold the remaining memory.  The task would begin again with as
little memory as before, and be interrupted again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import NamedTuple

_MOST_KINDS = 256
"""Most kinds of tasks remembered per user; the kind used least recently is forgotten."""
_MOST_USERS = 256
"""Most users remembered; users that are gone are forgotten first."""
_DECAY = 16
"""How slowly a remembered size shrinks when a task needs less.

The remembered size shrinks by the difference, divided by this number.
"""


class TaskKind(NamedTuple):
    """A kind of task; tasks of the same kind probably need similar amounts of memory.

    ``first`` is the number of bytes that a task of this kind needs according to its first message.
    """

    user: Hashable
    phase: str
    first: int


class Growths:
    """The peak memory, in bytes, that recent tasks of each kind needed.

    Each kind belongs to one user, so a user's large tasks do not make other users wait for more
    memory.  The number of kinds per user is limited, so no user can displace another user's kinds.
    If there are too many users, users for whom ``is_there`` returns false are forgotten first, and
    then the users whose last task is the oldest.
    """

    def __init__(self, is_there: Callable[[Hashable], bool] = lambda _: True) -> None:
        self._is_there = is_there
        self._most: OrderedDict[Hashable, OrderedDict[TaskKind, int]] = OrderedDict()

    def foresee(self, kind: TaskKind) -> int:
        """Return how many bytes a task of this kind will probably need.

        This is the size remembered from earlier tasks.  If no size is remembered, it is
        ``kind.first``.
        """
        kinds = self._most.get(kind.user)
        if kinds is None or kind not in kinds:
            return kind.first
        self._most.move_to_end(kind.user)
        kinds.move_to_end(kind)
        return kinds[kind]

    def note(self, kind: TaskKind, size: int) -> None:
        """Record that an open task needs ``size`` bytes, whether or not they are granted."""
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
        """Record that a task is over and needed ``size`` bytes in the end.

        If ``size`` is less than the remembered size, the remembered size shrinks a little.
        Therefore, a single large task does not make all later tasks wait for as much memory.
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
        """Return a user who is gone, or else the user whose last task is the oldest."""
        gone = (user for user in self._most if not self._is_there(user))
        return next(gone, next(iter(self._most)))
