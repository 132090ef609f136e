"""How a command's log looks: lines for people, or one JSON object a line for machines.

Both take the fields of an event from ``extra={...}`` of standard logging.  What peers sent may
stand in a log, so control characters are escaped: no one else can begin a line of it, or colour it.
"""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime
from enum import StrEnum

FIELDS = ("peer", "owner", "session", "phase", "step", "reason", "seconds", "bytes")
"""The fields that an event may carry, in the order in which they are written."""


class LogFormat(StrEnum):
    """Choices of ``--log-format``."""

    TEXT = "text"
    JSON = "json"


class LogLevel(StrEnum):
    """Choices of ``--log-level``."""

    DEBUG = "debug"
    INFO = "info"
    WARNING = "warning"
    ERROR = "error"


class TextFormatter(logging.Formatter):
    """``12:34:56  sentence``, with the fields behind it that the sentence does not have."""

    def format(self, record: logging.LogRecord) -> str:
        """Write one line."""
        time = datetime.fromtimestamp(record.created).strftime("%H:%M:%S")
        sentence = escape(record.getMessage())
        known = {name: escape(str(value)) for name, value in get_fields(record).items()}
        rest = [f"{name}={value}" for name, value in known.items() if value not in sentence]
        line = "  ".join([time, sentence, *([" ".join(rest)] if rest else [])])
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        return line


class JsonFormatter(logging.Formatter):
    """One JSON object a line: ``time`` (UTC, RFC 3339), ``level``, ``event``, and the fields."""

    def format(self, record: logging.LogRecord) -> str:
        """Write one line."""
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


class StderrHandler(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to what stderr is at that moment, and keeps no stream that others may close."""

    def __init__(self) -> None:
        super().__init__(sys.stderr)

    def emit(self, record: logging.LogRecord) -> None:
        """Write one record."""
        self.stream = sys.stderr
        super().emit(record)


def get_fields(record: logging.LogRecord) -> dict[str, object]:
    """Gather the fields of an event that are known and were given."""
    given = {name: getattr(record, name, None) for name in FIELDS}
    return {name: value for name, value in given.items() if value is not None}


def escape(text: str) -> str:
    r"""Write what does not print as ``\x1b`` or ``\u202e``, and a line break as ``\n``."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def log_to_stderr(level: LogLevel = LogLevel.INFO, log_format: LogFormat = LogFormat.TEXT) -> None:
    """Send splitonnx's log to stderr; called again, it replaces what was set before."""
    handler = StderrHandler()
    handler.setFormatter(JsonFormatter() if log_format is LogFormat.JSON else TextFormatter())
    logger = logging.getLogger("splitonnx")
    for former in [each for each in logger.handlers if isinstance(each, StderrHandler)]:
        logger.removeHandler(former)
    logger.addHandler(handler)
    logger.setLevel(level.value.upper())
    logger.propagate = False  # other packages hang handlers of their own on the root
    # A caller that speaks no websocket is no reason for a traceback.
    library = logging.getLogger("websockets")
    if not library.handlers:
        library.addHandler(logging.NullHandler())
    library.propagate = False
