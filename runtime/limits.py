"""What a server takes on and how long it waits: every limit with its default and unit.

Values alone; who enforces them is said with each.  ``docs/security.md`` lists them for users.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass, fields

from splitonnx.errors import UsageError

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30

MAY_BE_UNSET = ("memory_bytes", "task_bytes", "disk_per_owner", "norm")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The limits of one server.

    Raises:
        UsageError: one is not positive, or two contradict each other.
    """

    clients: int = 128
    """Connections at once that have shown a token, or all of them where none is needed; one more
    is refused with HTTP 503, or closing code 1013 where the token came as a message."""
    unauthenticated: int = 64
    """Connections at once that have shown no token yet, unfinished handshakes among them; with one
    more, the one that has waited longest is sent away (HTTP 503 or closing code 1013), so that
    those who hold back nothing get through a crowd of those who wait."""
    sessions: int = 32
    """Sessions at once in memory."""
    sessions_per_token: int = 8
    """Sessions at once in memory that belong to one owner; where nobody has a name, ``sessions``
    alone holds."""
    memory_bytes: int | None = None
    """Bytes of all sessions' states together; by default half of the machine's memory."""
    message_bytes: int = 256 * MIB
    """Bytes of one message; what a frame's header announces beyond it is never read (1009)."""
    unauthenticated_bytes: int = 16 * KIB
    """Bytes of one message, and of all together, before a token was shown (1009)."""
    messages_per_second: int = 10_000
    """Frames a second of one connection: messages, the fragments of larger ones, pings.  One
    second's worth may come at once; beyond it reading waits, so that the sender is slowed and not
    cut.  The default lies above what one connection reaches on loopback."""
    idle_seconds: float = 600.0
    """Seconds that a connection may be silent while the server waits for its next message."""
    message_seconds: float = 60.0
    """Seconds from a message's first byte to its last while the server reads it, however many
    pings come in between."""
    handshake_seconds: float = 10.0
    """Seconds for the TLS handshake, and again for the whole HTTP request."""
    login_seconds: float = 10.0
    """Seconds from there to the token, where it did not stand in the request's header."""
    unattended_seconds: float = 3600.0
    """Seconds that a session without a connection is kept in memory."""
    clients_per_token: int = 32
    """Connections at once of one owner; one more is refused as if the server were full.  Where
    nobody has a name, ``clients`` alone holds."""
    batch: int = 4096
    """Rows of one message's tensors, where their first dimension is not fixed."""
    task_bytes: int | None = None
    """Bytes that the tasks which run at a time may need together, by estimate from their graphs and
    the sizes on their wires; by default a quarter of the machine's memory."""
    stage_seconds: float = 300.0
    """Seconds that one stage may run."""
    workers: int = 16
    """Processes that run the stages of isolated sessions; each serves one owner at a time."""
    disk_per_owner: int | None = None
    """Bytes that one owner's checkpoints and outcomes may take on disk; none by default."""
    norm: float | None = None
    """Largest L2 norm of one gradient on the wire; none by default."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is None and field.name in MAY_BE_UNSET:
                continue
            if not value > 0 or not math.isfinite(value):
                raise UsageError(f"limit {field.name} must be positive and finite, not {value:g}")
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
        """Bytes of all sessions' states together: as given, or half of the machine's memory."""
        return self.memory_bytes or measure_memory() // 2

    @property
    def tasks(self) -> int:
        """Bytes of all running tasks together: as given, or a quarter of the machine's memory."""
        return self.task_bytes or measure_memory() // 4


def measure_memory() -> int:
    """Measure the machine's physical memory, in bytes; 4 GiB where it does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):  # Windows has no sysconf
        return 4 << 30
