"""Format the log of a command as lines of text for people, or as one JSON object per line.

Both formats read the fields of an event from the ``extra={...}`` argument of standard logging.  A
log may contain text that peers sent, so control characters are escaped.  Otherwise a peer could
start a new line or change the terminal's colours.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from enum import StrEnum

from splitonnx.runtime.edge.rate_limits import TokenBucket

FIELDS = ("peer", "owner", "session", "phase", "step", "reason", "seconds", "bytes", "left_out")
"""The fields that an event may have, in the order in which they are written."""
LINES_PER_SECOND = 100
"""The most log lines per second; further lines are counted and dropped, except errors."""


class LogFormat(StrEnum):
    """The values that ``--log-format`` accepts."""

    TEXT = "text"
    JSON = "json"


class LogLevel(StrEnum):
    """The values that ``--log-level`` accepts."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class TextFormatter(logging.Formatter):
    """A formatter that writes a record as one line of text.

    The line has the form ``12:34:56  sentence``, followed by the fields with values that are not in
    the sentence.  A traceback follows on further lines.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Format a record as one line of text, followed by its traceback if it has one."""
        time = datetime.fromtimestamp(record.created).strftime("%H:%M:%S")
        sentence = escape(record.getMessage())
        known = {name: escape(str(value)) for name, value in get_fields(record).items()}
        rest = [f"{name}={value}" for name, value in known.items() if value not in sentence]
        line = "  ".join([time, sentence, *([" ".join(rest)] if rest else [])])
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


class JsonFormatter(logging.Formatter):
    """A formatter that writes a record as one JSON object per line.

    The object contains ``time`` (UTC, RFC 3339), ``level``, ``logger``, ``event``, and the fields
    of the event.
    """

    def format(self, record: logging.LogRecord) -> str:
        """Format a record as one line of JSON."""
        time = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        entry: dict[str, object] = {
            "time": time.replace("+00:00", "Z"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            **get_fields(record),
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, default=str, allow_nan=True)  # ASCII: nothing to escape is left


class Brake(logging.Filter):
    """A logging filter that limits the number of lines per second.

    This keeps a flood of messages from filling the disk.  Errors are always written.  If lines were
    dropped, the next line that is written contains their number in the field ``left_out``.
    """

    def __init__(self, lines_per_second: float = LINES_PER_SECOND) -> None:
        super().__init__()
        self._pace = TokenBucket(lines_per_second, time.monotonic())
        self._left_out = 0

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether a record should be written."""
        now = time.monotonic()
        if record.levelno < logging.ERROR and self._pace.count(0, now):
            self._left_out += 1
            return False
        self._pace.count(1, now)
        if self._left_out:
            record.left_out, self._left_out = self._left_out, 0
        return True


def get_fields(record: logging.LogRecord) -> dict[str, object]:
    """Return the fields of a log record that are listed in ``FIELDS``."""
    given = {name: getattr(record, name, None) for name in FIELDS}
    return {name: value for name, value in given.items() if value is not None}


def escape(text: str) -> str:
    r"""Escape unprintable characters; for example, a line break becomes ``\n``."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


@contextmanager
def silencing(*names: str) -> Iterator[None]:
    """Prevent the named loggers from writing to stderr during a ``with`` block.

    Importing onnxruntime-training adds a handler to the root logger.  This handler would print a
    bug's traceback before the line that reports the bug.  :func:`logging_to_stderr` can still be
    used within the block.
    """
    loggers = [logging.getLogger(name) for name in names]
    before = [logger.propagate for logger in loggers]
    silent = logging.NullHandler()  # otherwise, Python prints what no handler takes
    for logger in loggers:
        logger.addHandler(silent)
        logger.propagate = False
    try:
        yield
    finally:
        for logger, propagate in zip(loggers, before, strict=True):
            logger.removeHandler(silent)
            logger.propagate = propagate


@contextmanager
def logging_to_stderr(
    level: LogLevel = LogLevel.INFO, log_format: LogFormat = LogFormat.TEXT
) -> Iterator[None]:
    """Log to stderr during a ``with`` block, and then restore the previous logging settings."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format is LogFormat.JSON else TextFormatter())
    handler.addFilter(Brake())
    ours = logging.getLogger("splitonnx")
    before = ours.level, ours.propagate
    ours.addHandler(handler)
    ours.setLevel(level.value.upper())
    ours.propagate = False  # other packages may add handlers to the root logger
    try:
        with silencing("websockets"):  # a caller that speaks no WebSocket would cause a traceback
            yield
    finally:
        ours.removeHandler(handler)
        ours.setLevel(before[0])
        ours.propagate = before[1]
