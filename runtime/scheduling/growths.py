"""What tasks grew to after their first message, so that the next of their kind begin with it.

Some sizes are bound by a task's later messages alone: then its memory is not known when it begins.
A client's tasks are much alike, so what one of them came to need is what the next is given at once.
Without that a task of which others hold the rest would be interrupted, begin again with as little,
and be interrupted again.
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
"""What part of what it did not need a task leaves to be forgotten."""


class TaskKind(NamedTuple):
    """Tasks that are taken to be alike; ``first`` are the bytes that the first message shows."""

    user: Hashable
    phase: str
    first: int


class Growths:
    """The most bytes that tasks of a kind were seen to need lately, by the kind.

    A kind holds the tasks of one user alone: nobody makes another's tasks wait for more.  Nor does
    anybody have another's kinds forgotten: each user has room for as many, and where users are too
    many, those go first for whom ``is_there`` is false, and then those longest without a task.
    """

    def __init__(self, is_there: Callable[[Hashable], bool] = lambda _: True) -> None:
        self._is_there = is_there
        self._most: OrderedDict[Hashable, OrderedDict[TaskKind, int]] = OrderedDict()

    def foresee(self, kind: TaskKind) -> int:
        """Return what a task of a kind will need: what its first message shows, or more."""
        kinds = self._most.get(kind.user)
        if kinds is None or kind not in kinds:
            return kind.first
        self._most.move_to_end(kind.user)
        kinds.move_to_end(kind)
        return kinds[kind]

    def note(self, kind: TaskKind, size: int) -> None:
        """Remember that an open task of a kind needs so many bytes, granted or not."""
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
        """Note that a task of a kind is over, which needed so many bytes.

        One that needed less takes some of what is remembered with it: a large one, once, does not
        let all that follow wait for as much.
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
        """Choose a user who is gone, or whoever was longest without a task."""
        gone = (user for user in self._most if not self._is_there(user))
        return next(gone, next(iter(self._most)))
