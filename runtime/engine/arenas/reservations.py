"""How much address space an arena may reserve without taking memory for it.

Most systems give a process memory when it first writes to a page, so address space costs nothing.
Where that is not so, or where address space is limited, nothing is reserved.
"""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

RESERVATION = 1 << 30
"""Bytes of address space that are reserved at a time."""

_OVERCOMMIT = Path("/proc/sys/vm/overcommit_memory")
_NEVER = "2"
"""Linux then counts what is reserved as if it were used."""


def choose_reservation() -> int:
    """Return the number of bytes to reserve at a time; 0 if reserving takes what others need.

    Windows counts reserved memory as used, Linux does so if overcommitting is turned off, and a
    limit on this process's address space or data (``ulimit -v`` and ``-d``) counts it everywhere.
    """
    if sys.platform == "win32" or sys.maxsize < 1 << 32 or _is_limited():
        return 0
    with suppress(OSError):  # not on Linux
        if _OVERCOMMIT.read_text().strip() == _NEVER:
            return 0
    return RESERVATION


def _is_limited() -> bool:
    if sys.platform == "win32":
        return False
    import resource

    kinds = (resource.RLIMIT_AS, resource.RLIMIT_DATA)
    return any(resource.getrlimit(kind)[0] != resource.RLIM_INFINITY for kind in kinds)
