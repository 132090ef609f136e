"""How fast one connection may talk: a token bucket, without a clock of its own."""

from __future__ import annotations


class Pace:
    """Lets ``rate`` events a second through, and one second's worth of them at once."""

    def __init__(self, rate: float, now: float) -> None:
        self._rate = rate
        self._left = rate
        self._seen = now

    def count(self, events: int, now: float) -> float:
        """Count events that have happened, and give the seconds to wait before the next."""
        self._left = min(self._rate, self._left + (now - self._seen) * self._rate) - events
        self._seen = now
        return max(0.0, -self._left / self._rate)
