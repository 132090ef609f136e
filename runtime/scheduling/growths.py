"""What tasks grew to after their first message, so that the next of their kind begin with it.

Some sizes are bound by a task's later messages alone: then its memory is not known when it begins.
A client's tasks are much alike, so what one of them came to need is what the next is given at once.
Without that a task of which others hold the rest would be interrupted, begin again with as little,
and be interrupted again.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

_MOST_REMEMBERED = 1024
"""Kinds of tasks that are remembered; those that were longest without one are forgotten."""

Kind = tuple[Hashable, str, int]
"""Tasks that are taken to be alike: the user, the phase, the bytes that the first message shows."""


class Growths:
    """The most bytes that tasks of a kind were seen to need, by the kind.

    A kind holds the tasks of one user alone: nobody makes another's tasks wait for more.
    """

    def __init__(self) -> None:
        self._most: OrderedDict[Kind, int] = OrderedDict()

    def foresee(self, kind: Kind) -> int:
        """Return what a task of a kind will need: what its first message shows, or more."""
        return max(self._most.get(kind, 0), kind[2])

    def note(self, kind: Kind, size: int) -> None:
        """Remember that a task of a kind needed so many bytes, granted or not."""
        self._most[kind] = max(size, self.foresee(kind))
        self._most.move_to_end(kind)
        if len(self._most) > _MOST_REMEMBERED:
            self._most.popitem(last=False)
