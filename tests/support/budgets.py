"""What tests of the memory for tasks share: an event loop, a clock of their own, names of tasks."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable


class Clock:
    """A clock that stands until it is set."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def run(test: Callable[[], Awaitable[None]]) -> None:
    """Run a test in an event loop of its own."""
    asyncio.run(_run(test))


async def _run(test: Callable[[], Awaitable[None]]) -> None:
    await test()


def task(name: str) -> tuple[str, str]:
    """Name a task of training, by its session."""
    return name, "train"
