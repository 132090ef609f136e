"""The limits of a server, each with its default value and its help text.

Each limit is defined only here: the options of ``serve`` and the table in ``docs/security.md`` are
generated from the fields of :class:`Limits`.  This module only holds the values; other modules
enforce them.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, field, fields
from typing import Any, TypeVar, get_type_hints

from splitonnx.errors import UsageError

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

_T = TypeVar("_T")


def _limit(default: _T, text: str, *, beyond: str, unset: str = "", earlier: str = "") -> _T:
    """Define a field of :class:`Limits`; :class:`LimitHelp` describes the arguments."""
    metadata = {"text": text, "beyond": beyond, "unset": unset, "earlier": earlier}
    found: _T = field(default=default, metadata=metadata)
    return found


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The limits that a server enforces.

    Raises:
        UsageError: a limit is not positive, or two limits contradict each other.
    """

    clients: int = _limit(
        128,
        "Connections at once that are authenticated",
        beyond="HTTP 503, or closing code 1013",
    )
    # So authenticated clients get through a flood of connections that wait.
    unauthenticated: int = _limit(
        64,
        "Connections at once that have shown no token yet",
        beyond="the one that has waited longest is closed: 503 or 1013",
        earlier="strangers",
    )
    sessions: int = _limit(32, "Sessions at once in memory", beyond="refused as `ServerBusy`")
    sessions_per_token: int = _limit(
        8,
        "Sessions at once in memory of one owner of tokens",
        beyond="refused as `ServerBusy`",
    )
    memory_bytes: int | None = _limit(
        None,
        "Bytes of all sessions' states",
        unset="half of the machine's memory",
        beyond="refused as `ServerBusy`",
    )
    message_bytes: int = _limit(
        256 * MIB, "Bytes of one message", beyond="closing code 1009 at the frame's header"
    )
    unauthenticated_bytes: int = _limit(
        16 * KIB,
        "Bytes of all messages before a token was shown",
        beyond="closing code 1009; the request may have 16 KiB more: HTTP 431",
        earlier="stranger_bytes",
    )
    # One second's worth may come at once.  The default is above what one connection reaches on
    # loopback.
    messages_per_second: int = _limit(
        10_000,
        "Messages, fragments and pings a second of one connection",
        beyond="it is read more slowly",
    )
    idle_seconds: float = _limit(
        600.0,
        "Seconds that a connection may be silent, or leave a reply unread",
        beyond="closing code 1001; cut off",
    )
    message_seconds: float = _limit(
        60.0, "Seconds from a message's first byte to its last", beyond="closing code 1001"
    )
    handshake_seconds: float = _limit(
        10.0,
        "Seconds for the handshake of TLS, and again of HTTP",
        beyond="cut off, HTTP 408",
    )
    login_seconds: float = _limit(
        10.0,
        "Seconds from the handshake to a token that comes as a message",
        beyond="closing code 1008",
    )
    unattended_seconds: float = _limit(
        3600.0,
        "Seconds that a session without a connection stays in memory",
        beyond="written to disk and unloaded",
    )
    clients_per_token: int = _limit(
        32,
        "Connections at once of one owner of tokens",
        beyond="HTTP 503, or closing code 1013",
    )
    batch: int = _limit(4096, "Rows of one message's tensors", beyond="refused as `BatchTooLarge`")
    task_bytes: int | None = _limit(
        None,
        "Bytes that the tasks which run at a time need, by estimate",
        unset="a quarter of the machine's memory",
        beyond="the task waits, or is refused as `TaskTooLarge`",
    )
    stage_seconds: float = _limit(
        300.0,
        "Seconds that one stage may run",
        beyond="it is stopped, refused as `StageTooSlow`",
    )
    workers: int = _limit(
        16,
        "Processes for isolated sessions, each for one owner at a time",
        beyond="tasks wait for one",
    )
    disk_per_owner: int | None = _limit(
        None,
        "Bytes of one owner's checkpoints and outcomes on disk",
        unset="no limit",
        beyond="not saved: `Unsaved`",
    )
    norm: float | None = _limit(
        None,
        "Largest L2 norm of a gradient that arrives",
        unset="no limit",
        beyond="refused as `NormTooLarge`, the step is not made",
    )

    def __post_init__(self) -> None:
        for limit in fields(self):
            value = getattr(self, limit.name)
            if value is None and limit.metadata["unset"]:
                continue
            if not value > 0 or not math.isfinite(value):
                raise UsageError(f"limit {limit.name} must be positive and finite, not {value:g}")
        if self.unauthenticated_bytes > self.message_bytes:
            raise UsageError(
                f"limit unauthenticated_bytes ({self.unauthenticated_bytes}) is larger than "
                f"message_bytes ({self.message_bytes})"
            )
        if self.message_seconds > self.idle_seconds:
            raise UsageError(
                f"limit message_seconds ({self.message_seconds:g}) is larger than idle_seconds "
                f"({self.idle_seconds:g})"
            )

    @property
    def memory(self) -> int:
        """Return how many bytes of memory the states of all sessions together may occupy.

        The default is half of the machine's memory.
        """
        return self.memory_bytes or measure_memory() // 2

    @property
    def tasks(self) -> int:
        """Return how many bytes of memory all running tasks together may occupy.

        The default is a quarter of the machine's memory.
        """
        return self.task_bytes or measure_memory() // 4


def measure_memory() -> int:
    """Return the machine's physical memory in bytes, or 4 GiB if the system does not report it."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # Windows has no sysconf
        return 4 << 30


@dataclass(frozen=True, kw_only=True)
class LimitHelp:
    """The description of one limit, for the command line and the documentation.

    ``text`` says what is limited, and ``beyond`` says what happens when the limit is exceeded.
    ``unset`` says what applies if the limit's default is ``None``.  ``earlier`` is the limit's name
    in version 0.1.0 if it was different.
    """

    name: str
    type: Any
    default: float | None
    text: str
    beyond: str
    unset: str
    earlier: str


def list_limits() -> tuple[LimitHelp, ...]:
    """Return the descriptions of all limits."""
    types = get_type_hints(Limits)
    return tuple(
        LimitHelp(name=f.name, type=types[f.name], default=getattr(Limits, f.name), **f.metadata)
        for f in fields(Limits)
    )
