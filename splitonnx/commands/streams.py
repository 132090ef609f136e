"""Replace standard streams that were closed before the process started (``>&-``).

Python sets a closed stream to ``None``.  The next file that is opened gets the stream's file
descriptor, so the output of native code would be written into that file.
"""

from __future__ import annotations

import errno
import os
import sys
from typing import TextIO

_FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})
"""Error codes of failed writes to a full disk; such an error does not contain a file name."""


def replace_closed_streams() -> None:
    """Open the null device in place of each closed standard stream.

    Therefore no other file gets the stream's descriptor.  Writing to stdout then raises
    :class:`OSError`, and output to stderr is discarded.  ``sys.stdin`` stays ``None``.
    """
    if None not in (sys.stdin, sys.stdout, sys.stderr):
        return
    for number in range(3):
        _occupy(number)
    if sys.stdout is None:  # opened for reading, so that a write fails
        sys.stdout = open(os.open(os.devnull, os.O_RDONLY), "w", encoding="utf-8")  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115


def _occupy(number: int) -> None:
    """Open the null device as descriptor ``number`` if that is closed, so that no file gets it.

    Child processes inherit the descriptor.
    """
    try:
        os.fstat(number)
    except OSError:
        opened = os.open(os.devnull, os.O_RDONLY if number == 1 else os.O_RDWR)
        if opened != number:
            os.dup2(opened, number)
            os.close(opened)
        os.set_inheritable(number, True)


def explain_failed_print(error: OSError) -> str | None:
    """Return the reason why printing failed, or ``None`` if ``error`` has another cause."""
    if error.filename:
        return None
    if error.errno == errno.EBADF and not _can_write(sys.stdout.fileno()):
        return "standard output is closed"
    return error.strerror if error.errno in _FULL else None


def _can_write(descriptor: int) -> bool:
    try:
        os.write(descriptor, b"")
    except OSError:
        return False
    return True


def discard_unprinted(stream: TextIO) -> None:
    """Discard a stream's buffered output, so that Python does not fail to flush it at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
