"""Ctrl-C whose exception is discarded, as some code of other libraries does."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress


def lose_interrupt() -> None:
    """Press Ctrl-C, and discard the exception."""
    with suppress(BaseException):
        signal.raise_signal(signal.SIGINT)


@contextmanager
def taking_interrupts() -> Iterator[None]:
    """Handle Ctrl-C as Python does, also where the tests run in the background."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
