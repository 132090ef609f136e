"""How many files this process may open: connections get what its own files leave them."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable

SCARCE = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
"""What ``accept`` fails with where the process or the machine has no more to give."""
RESERVE = 32
"""Descriptors kept for files, such as checkpoints; a quarter where fewer than four times as many
are allowed."""
SECONDS = 10.0
"""Seconds between two lines of the log that say so."""


def find_limit() -> int:
    """Return how many descriptors this process may have."""
    try:
        import resource
    except ImportError:  # Windows
        return sys.maxsize
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return sys.maxsize if limit == resource.RLIM_INFINITY else limit


def find_ceiling() -> int:
    """Return the file number from which on a connection is one too many.

    The operating system hands out the lowest number that is free, so the number of a new
    connection says how many files are open.
    """
    limit = find_limit()
    return limit - min(RESERVE, limit // 4)


def raise_limit(needed: int) -> int:
    """Raise the limit to ``needed`` as far as this process may, and return what it is then."""
    limit = find_limit()
    if limit >= needed:
        return limit
    import resource

    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    wanted = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted


class Rarely:
    """Lets a line of the log through once in so many seconds, and counts the others."""

    def __init__(self, clock: Callable[[], float], seconds: float = SECONDS) -> None:
        self._clock = clock
        self._seconds = seconds
        self._next: float | None = None
        self._count = 0

    def count(self) -> int:
        """Count an event; return how many there were since the last line if one is due, else 0."""
        self._count += 1
        now = self._clock()
        if self._next is not None and now < self._next:
            return 0
        self._next, counted, self._count = now + self._seconds, self._count, 0
        return counted
