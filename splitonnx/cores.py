"""The cores that this process may use.

They are fewer than the machine's if the process was bound to some of them, by ``taskset``, a
container's set of processors or ``os.sched_setaffinity``.
"""

from __future__ import annotations

import os


def count_cores() -> int:
    """Return the number of cores that this process may use, which is at least 1."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def is_bound() -> bool:
    """Return whether this process may use only some of the machine's cores."""
    return count_cores() < (os.cpu_count() or 1)
