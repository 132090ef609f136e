"""Ctrl-C that counts even if other code discards the exception.

On Ctrl-C, Python raises ``KeyboardInterrupt`` wherever the main thread happens to be.  Some code
there discards every exception: Python itself does so in ``__del__`` and in the callbacks of weak
references, and modules compiled by Cython do so in one place while they are imported.  numpy
imports such modules when a program first draws random numbers, which in a training is just before
the first step.  Without this module, the training would continue as if nothing had happened.

A process that runs a command calls :func:`noting_interrupts`.  Code that repeats itself calls
:func:`check_interrupt`.  It does not know which commands there are.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn


class _Note:
    """Whether Ctrl-C was pressed; a plain value, since a handler must not wait for a lock."""

    is_pressed = False


_NOTE = _Note()


@contextmanager
def noting_interrupts() -> Iterator[None]:
    """Remember each Ctrl-C inside a ``with`` block, for :func:`check_interrupt`.

    Ctrl-C still raises ``KeyboardInterrupt`` at once, and Python does not report where it discards
    that.  If the process ignores SIGINT or handles it in its own way, or if this is not the main
    thread, nothing changes.
    """
    is_main = threading.current_thread() is threading.main_thread()
    if not is_main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    report = sys.unraisablehook
    signal.signal(signal.SIGINT, note_interrupt)
    sys.unraisablehook = lambda lost: None if _is_noted(lost.exc_value) else report(lost)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        sys.unraisablehook = report
        _NOTE.is_pressed = False


def _is_noted(error: BaseException | None) -> bool:
    return _NOTE.is_pressed and isinstance(error, KeyboardInterrupt)


def note_interrupt(number: int, frame: FrameType | None) -> NoReturn:
    """Note that Ctrl-C was pressed, and raise ``KeyboardInterrupt``; this is the signal handler."""
    _NOTE.is_pressed = True
    raise KeyboardInterrupt


def keep_exit_code() -> None:
    """Make the process end with the exit code of its ``SystemExit`` after Ctrl-C was caught.

    If Ctrl-C interrupts code that is run from a string, such as the methods that ``dataclasses``
    writes, CPython remembers it as not caught, whoever catches it.  A program that was started with
    ``python -m`` then ends by the signal instead.  CPython forgets it when it runs another string.
    """
    exec("")


def check_interrupt() -> None:
    """Raise ``KeyboardInterrupt`` if Ctrl-C was pressed inside :func:`noting_interrupts`.

    Call this where work begins or is repeated, but not where code cleans up after an interrupt.  In
    other threads than the main one, it does nothing.
    """
    if _NOTE.is_pressed and threading.current_thread() is threading.main_thread():
        raise KeyboardInterrupt
