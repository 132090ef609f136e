"""What tasks grew to after their first message, so that the next of their kind begin with it.

Some sizes are bound by a task's later messages alone: then its memory is not known when it begins.
A client's tasks are much alike, so what one of them came to need is what the next is given at once.
Without that a task of which others hold the rest would be interrupted, begin again with as little,
and be interrupted again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import NamedTuple

_MOST_REMEMBERED = 1024
"""Kinds of tasks that are remembered; those that were longest without one are forgotten."""
_DECAY = 16
"""What part of what it did not need a task leaves to be forgotten."""


class TaskKind(NamedTuple):
    """Tasks that are taken to be alike; ``first`` are the bytes that the first message shows."""

    user: Hashable
    phase: str
    first: int


class Growths:
    """The most bytes that tasks of a kind were seen to need lately, by the kind.

    A kind holds the tasks of one user alone: nobody makes another's tasks wait for more.
    """

    def __init__(self) -> None:
        self._most: OrderedDict[TaskKind, int] = OrderedDict()

    def foresee(self, kind: TaskKind) -> int:
        """Return what a task of a kind will need: what its first message shows, or more."""
        if kind not in self._most:
            return kind.first
        self._most.move_to_end(kind)
        return self._most[kind]

    def note(self, kind: TaskKind, size: int) -> None:
        """Remember that an open task of a kind needs so many bytes, granted or not."""
        if size <= self.foresee(kind):
            return
        self._most[kind] = size
        if len(self._most) > _MOST_REMEMBERED:
            self._most.popitem(last=False)

    def end(self, kind: TaskKind, size: int) -> None:
        """Note that a task of a kind is over, which needed so many bytes.

        One that needed less takes some of what is remembered with it: a large one, once, does not
        let all that follow wait for as much.
        """
        if kind not in self._most:
            return
        self._most[kind] -= -(-(self._most[kind] - size) // _DECAY)
        if self._most[kind] <= kind.first:
            del self._most[kind]
