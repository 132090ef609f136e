"""Limits on the rate and duration of a connection: a token bucket, and timers for deadlines."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # slow to import, and a command's log needs the token bucket alone
    import asyncio


class TokenBucket:
    """A token bucket that allows ``rate`` events per second, and bursts of up to ``rate`` events.

    ``now`` is always the current time in seconds, which the caller passes.
    """

    def __init__(self, rate: float, now: float) -> None:
        self._rate = rate
        self._left = rate
        self._seen = now

    def count(self, events: int, now: float) -> float:
        """Count ``events``, and return how many seconds to wait before the next one."""
        self._left = min(self._rate, self._left + (now - self._seen) * self._rate) - events
        self._seen = now
        return max(0.0, -self._left / self._rate)


class Timers:
    """Named timers that call functions after a delay; each name has at most one running timer."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._timers: dict[str, asyncio.TimerHandle] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._timers

    def start(self, name: str, seconds: float, function: Callable[[], object]) -> None:
        """Call a function after ``seconds``, unless a timer with this name is already running."""
        if name not in self._timers:
            self._timers[name] = self._loop.call_later(seconds, self._fire, name, function)

    def stop(self, name: str) -> None:
        """Stop the timer with this name, if there is one."""
        if timer := self._timers.pop(name, None):
            timer.cancel()

    def stop_all(self) -> None:
        """Stop every timer."""
        for name in tuple(self._timers):
            self.stop(name)

    def _fire(self, name: str, function: Callable[[], object]) -> None:
        del self._timers[name]
        function()
