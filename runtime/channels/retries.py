"""How long a client waits before it tries its server again; the waiting is done elsewhere."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass

from splitonnx.errors import UsageError

FIRST_DELAY = 0.05
"""Seconds before the second attempt to reconnect; the first is made at once."""
LONGEST_DELAY = 10.0
"""Seconds between two attempts at the most."""


@dataclass(frozen=True, kw_only=True)
class Backoff:
    """How long to wait from attempt to attempt, and when to give up.

    Each wait is drawn between half and the whole of a bound that doubles, so that the clients of a
    server that comes back do not all come at once.  ``give_up_after`` is in seconds since the
    connection was lost, ``None`` for never.

    Raises:
        UsageError: a time is negative or not a number, or ``first`` is longer than ``longest``.
    """

    first: float = FIRST_DELAY
    longest: float = LONGEST_DELAY
    give_up_after: float | None = None

    def __post_init__(self) -> None:
        for name in ("first", "longest", "give_up_after"):
            seconds: float | None = getattr(self, name)
            if seconds is not None and not seconds >= 0:  # nor NaN, which no number is below
                raise UsageError(f"{name} must be 0 seconds or more, not {seconds:g}")
        if self.first > self.longest:
            raise UsageError(
                f"the first wait must not be longer than the longest ({self.longest:g} s), "
                f"not {self.first:g} s"
            )

    def delays(self) -> Iterator[float]:
        """Yield the seconds to wait before each attempt, without end."""
        yield 0.0
        bound = self.first
        while True:
            yield random.uniform(bound / 2, bound)
            bound = min(2 * bound, self.longest)
