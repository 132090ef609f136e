"""The limit on this process's file descriptors, and the share of it that connections may use."""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable

SCARCE = frozenset({errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM})
"""Errors of ``accept`` when the process or the machine has no resources left."""
RESERVE = 32
"""File descriptors reserved for files such as checkpoints, but at most a quarter of the limit."""
SECONDS = 10.0
"""Seconds between two log lines about missing descriptors."""


def find_limit() -> int:
    """Return how many file descriptors this process may open."""
    try:
        import resource
    except ImportError:  # Windows
        return sys.maxsize
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return sys.maxsize if limit == resource.RLIM_INFINITY else limit


def find_ceiling() -> int:
    """Return the lowest descriptor number at which a new connection is refused.

    The operating system always assigns the lowest free number, so the number of a new connection's
    descriptor indicates how many files are open.
    """
    limit = find_limit()
    return limit - min(RESERVE, limit // 4)


def raise_limit(needed: int) -> int:
    """Raise the limit on file descriptors to ``needed``, and return the resulting limit.

    If ``needed`` is more than the operating system permits, the limit is raised as far as possible.
    """
    limit = find_limit()
    if limit >= needed:
        return limit
    import resource

    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    wanted = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    return wanted


class Rarely:
    """A rate limit for a log message: at most one per interval.

    ``seconds`` is the length of the interval, and ``clock`` returns the current time in seconds.
    Events that are not logged are counted and reported with the next message.
    """

    def __init__(self, clock: Callable[[], float], seconds: float = SECONDS) -> None:
        self._clock = clock
        self._seconds = seconds
        self._next: float | None = None
        self._count = 0

    def count(self) -> int:
        """Count an event, and return how many events to report now.

        The result is the number of events since the last report, or 0 if no report is due yet.
        """
        self._count += 1
        now = self._clock()
        if self._next is not None and now < self._next:
            return 0
        self._next, counted, self._count = now + self._seconds, self._count, 0
        return counted
