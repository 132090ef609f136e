"""Internal errors: bugs in this package are logged with their traceback when they are caught.

The code that catches such a bug raises an error which names the failed work and asks for a report.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from splitonnx.errors import InternalRuntimeError, SplitonnxError

LOGGER = "splitonnx.faults"
"""The logger that tracebacks are written to."""


def log_mistake(subject: str, error: BaseException) -> None:
    """Log a bug in this package that occurred while working on ``subject``, with its traceback."""
    logging.getLogger(LOGGER).error(
        "a mistake in splitonnx: %s (%s: %s)",
        subject,
        type(error).__name__,
        error,
        exc_info=error,
    )


@contextmanager
def attribute_errors_to_us(subject: str) -> Iterator[None]:
    """Turn unexpected exceptions of the work on ``subject`` into an internal error of this package.

    Errors that are raised on purpose pass unchanged, and so does running out of memory.

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
