"""Mistakes of this package: each is logged with its traceback, wherever it is caught.

Whoever catches one makes an error of it that says what was at work and asks for a report.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

from splitonnx.errors import InternalRuntimeError, SplitonnxError

LOGGER = "splitonnx.faults"
"""The logger that has the tracebacks."""


def log_mistake(subject: str, error: BaseException) -> None:
    """Log a mistake of ours in the work on ``subject``, with its traceback."""
    logging.getLogger(LOGGER).error(
        "a mistake in splitonnx: %s (%s: %s)",
        subject,
        type(error).__name__,
        error,
        exc_info=error,
    )


@contextmanager
def attribute_errors_to_us(subject: str) -> Iterator[None]:
    """Own up to whatever fails in the work on ``subject`` and is not raised on purpose.

    Running out of memory is not a mistake and passes unchanged.

    Raises:
        InternalRuntimeError: the work itself is wrong.
    """
    try:
        yield
    except (SplitonnxError, MemoryError):
        raise
    except Exception as error:
        log_mistake(subject, error)
        raise InternalRuntimeError(subject, f"{type(error).__name__}: {error}") from error
