"""A thread beside an event loop, for what would block the loop.

The loop waits for it even if the task that asked for the work is cancelled, so nothing that was
begun still runs when control returns to the program.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from typing import TypeVar, TypeVarTuple

_Arguments = TypeVarTuple("_Arguments")
_Result = TypeVar("_Result")


class WorkThread:
    """A thread that runs one function after the other; it starts when it is first needed.

    ``on_cancel`` is called if the task that waits for a function is cancelled; it may make the
    function end earlier.
    """

    def __init__(self, on_cancel: Callable[[], None] | None = None) -> None:
        self._on_cancel = on_cancel
        self._pool: ThreadPoolExecutor | None = None

    async def run(
        self, function: Callable[[*_Arguments], _Result], *arguments: *_Arguments
    ) -> _Result:
        """Run a function in the thread, and return its result.

        A function must not raise ``StopIteration``.

        Raises:
            CancelledError: the task was cancelled; the function has ended nevertheless.
        """
        if self._pool is None:
            self._pool = ThreadPoolExecutor(1, thread_name_prefix="splitonnx-work")
        work = partial(contextvars.copy_context().run, function, *arguments)
        running = asyncio.wrap_future(self._pool.submit(work))
        try:
            return await asyncio.shield(running)
        except asyncio.CancelledError:
            if self._on_cancel is not None:
                self._on_cancel()
            await _wait_for_end(running)
            raise

    def close(self) -> None:
        """End the thread, in which nothing runs any more; a later :meth:`run` starts another."""
        if self._pool is not None:
            self._pool.shutdown()
            self._pool = None


async def _wait_for_end(running: asyncio.Future[_Result]) -> None:
    """Wait until a function has ended, however often the task is cancelled meanwhile."""
    while not running.done():
        with suppress(asyncio.CancelledError):
            await asyncio.wait([running])
    if not running.cancelled():
        running.exception()  # nobody else asks for it
