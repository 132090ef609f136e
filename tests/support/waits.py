"""Waits for another process that end: a fault fails a test and does not hang it."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import IO, TypeVar

SECONDS = 120.0
"""The longest wait; far more than any of these takes on a busy machine."""

_Result = TypeVar("_Result")


def wait_for(find: Callable[[], _Result], seconds: float = SECONDS) -> _Result:
    """Call ``find`` until its result is true, and return the result."""
    end = time.monotonic() + seconds
    while not (found := find()):
        assert time.monotonic() < end, f"it did not come within {seconds:g} seconds"
        time.sleep(0.01)
    return found


def skip_to(stream: IO[str], text: str) -> None:
    """Read lines from a process until one contains ``text``; fail where the process ends first."""
    for line in stream:
        if text in line:
            return
    raise AssertionError(f"the process ended without '{text}'")
