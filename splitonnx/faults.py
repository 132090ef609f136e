"""Log unexpected exceptions as bugs in this package, with their tracebacks.

The code that catches an unexpected exception raises one of splitonnx's own errors instead.  The
message of that error says what failed, and asks the user to report the bug.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from splitonnx.errors import InternalRuntimeError, SplitonnxError

LOGGER = "splitonnx.faults"
"""The logger that tracebacks are written to."""


def log_mistake(subject: str, error: BaseException) -> None:
    """Log an unexpected exception as a bug in this package, with its traceback.

    ``subject`` describes the work that failed.
    """
    logging.getLogger(LOGGER).error(
        "a mistake in splitonnx: %s (%s: %s)",
        subject,
        type(error).__name__,
        error,
        exc_info=error,
    )


@contextmanager
def attribute_errors_to_us(subject: str) -> Iterator[None]:
    """Convert unexpected exceptions in the ``with`` block to internal errors of this package.

    ``subject`` describes the work in this block.  ``MemoryError`` and the errors that
    splitonnx raises on purpose pass through unchanged.

    Raises:
        InternalRuntimeError: an unexpected exception was raised.
    """
    try:
        yield
    except (SplitonnxError, MemoryError):
        raise
    except Exception as error:
        log_mistake(subject, error)
        raise InternalRuntimeError(subject, f"{type(error).__name__}: {error}") from error
