"""The event loop that a server runs on: uvloop's where it is installed, and asyncio's otherwise.

uvloop takes less processor time for large messages.  It comes with the extra ``fast``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from importlib.metadata import version
from typing import Any, TypeVar

OLDEST = (0, 23)
"""Version of uvloop from which on bytes are sent at once when they are written.

Earlier versions send them later, and lose them if the connection is aborted meanwhile, as it is
after the reason for a refusal was written.
"""

T = TypeVar("T")


def run(main: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end on a new event loop, and return its result."""
    make, _ = _choose()
    with asyncio.Runner(loop_factory=make) as runner:
        return runner.run(main)


def describe() -> str:
    """Describe which event loop :func:`run` takes, for a line of the server's log.

    The line says why it is not uvloop's, if it is not.
    """
    _, description = _choose()
    return f"the event loop is {description}"


def _choose() -> tuple[Callable[[], asyncio.AbstractEventLoop], str]:
    """Return a function that makes an event loop, and what it is."""
    try:
        import uvloop  # noqa: F401
    except ImportError:
        return asyncio.new_event_loop, "asyncio's; uvloop is not installed"
    found = version("uvloop")
    if tuple(map(int, found.split(".")[:2])) < OLDEST:
        wanted = ".".join(map(str, OLDEST))
        return asyncio.new_event_loop, f"asyncio's; uvloop {found} is older than {wanted}"
    from splitonnx.runtime.scheduling.accepting_loops import AcceptingLoop

    return AcceptingLoop, f"uvloop's {found}"
