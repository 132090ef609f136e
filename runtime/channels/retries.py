"""Exponential backoff: how long a client waits before each attempt to reconnect.

This module computes the times; the caller reads the clock and does the waiting.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from splitonnx.errors import UsageError

FIRST_DELAY = 0.05
"""Seconds before the second attempt to reconnect; the first attempt is made at once."""
LONGEST_DELAY = 10.0
"""Longest wait between two attempts, in seconds."""


@dataclass(frozen=True, kw_only=True)
class Backoff:
    """How long to wait between attempts to reconnect, and when to give up.

    The first attempt is made at once.  Each later wait is chosen at random between half of an upper
    bound and that bound.  The bound starts at ``first`` and doubles after each attempt, up to
    ``longest``.  Because the waits are random, the clients of a restarted server do not all
    reconnect at once.  The client gives up ``give_up_after`` seconds after the connection was lost,
    or never if this is ``None``.

    Raises:
        UsageError: a time is negative or NaN, or ``first`` is longer than ``longest``.
    """

    first: float = FIRST_DELAY
    longest: float = LONGEST_DELAY
    give_up_after: float | None = None

    def __post_init__(self) -> None:
        for name in ("first", "longest", "give_up_after"):
            seconds: float | None = getattr(self, name)
            if seconds is not None and not seconds >= 0:  # this also rejects NaN
                raise UsageError(f"{name} must be 0 seconds or more, not {seconds:g}")
        if self.first > self.longest:
            raise UsageError(
                f"the first wait must not be longer than the longest ({self.longest:g} s), "
                f"not {self.first:g} s"
            )

    def delays(self) -> Iterator[float]:
        """Yield the number of seconds to wait before each attempt; the first is 0.

        The iterator never ends.
        """
        yield 0.0
        bound = self.first
        while True:
            yield random.uniform(bound / 2, bound)
            bound = min(2 * bound, self.longest)


class Attempts:
    """The attempts to connect since the connection was lost; they end when a message arrives."""

    def __init__(self, backoff: Backoff) -> None:
        self._backoff = backoff
        self._delays: Iterator[float] | None = None
        self._lost_at: float | None = None

    def find_delay(self, now: float, *, can_give_up: bool) -> float | None:
        """Return how many seconds to wait before the next attempt; ``None`` means to give up.

        ``now`` is the time in seconds.
        """
        if self._lost_at is None:
            self._lost_at = now
        if self._delays is None:
            self._delays = self._backoff.delays()
        delay, limit = next(self._delays), self._backoff.give_up_after
        if limit is None or not can_give_up:
            return delay
        left = self._lost_at + limit - now
        return min(delay, left) if left > 0 else None

    def note_progress(self) -> None:
        """Record that a new message arrived; the next attempts start with the shortest delay."""
        self._delays = self._lost_at = None

    def forget_loss(self) -> None:
        """Count the time before giving up from the next loss on."""
        self._lost_at = None
