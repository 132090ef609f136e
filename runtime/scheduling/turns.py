"""A fair queue that decides which owner computes next, so that no owner blocks the others.

A *piece of work* is a function that runs in a thread.  Each owner has its own queue of pieces.  At
most one piece per owner runs at a time, and the owner that has used the least time comes next.
This is start-time fair queuing (Goyal, Vin and Cheng, 1996).  How long a piece takes is known only
when it is done.  An owner that returns after a pause starts level with the others and gets no
credit for the pause.

Very short pieces count as equally long.  What is measured of them is mostly how long the thread
waited for a CPU or for the interpreter's lock, so that owners with equal work would get unequal
turns.

The number of pieces that run at the same time is limited, and running pieces are not interrupted.
One more piece may run if its owner's pieces are short, so that the long pieces of other owners
cannot block that owner.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections import deque
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from splitonnx.cores import count_cores

SHORT = 0.1
"""Longest time in seconds of a short piece; owners with only short pieces share an extra place."""
LEAST_COUNTED = 0.01
"""Time in seconds that a piece counts for at least.

With 200 clients on two CPUs, pieces of 0.6 ms were measured as 0.1 to 10 ms.  Ten milliseconds are
above 99.9 % of these, and short enough for the others to wait.
"""
_MOST_IDLE = 1024
"""Most owners that are remembered; above that, owners that do not wait are forgotten."""
_FADING = 0.9
"""The factor by which an owner's remembered longest piece shrinks after each piece."""

_Piece = TypeVar("_Piece")
_Result = TypeVar("_Result")


@dataclass(kw_only=True, eq=False)
class _Line(Generic[_Piece]):
    """The pieces of one owner, each with its number in the order of arrival.

    ``start`` is the virtual time at which the next piece may begin.  ``longest`` is the time in
    seconds of the longest recent piece, or ``None`` before the first piece.  ``is_beside`` is true
    if the running piece uses the extra place for short pieces.
    """

    pieces: deque[tuple[int, _Piece]] = field(default_factory=deque)
    start: float
    longest: float | None = None
    is_running: bool = False
    is_beside: bool = False


class FairQueue(Generic[_Piece]):
    """A queue that puts waiting pieces of work in order; it uses no threads and no clock.

    ``places`` is the number of pieces that may run at the same time, at most one per owner.  One
    more piece may run if all recent pieces of its owner were short.
    """

    def __init__(self, places: int) -> None:
        self._places = places
        self._lines: dict[Hashable, _Line[_Piece]] = {}
        self._waiting = 0
        self._running = 0  # in the places that any owner may use
        self._is_beside = False  # whether the place for short pieces is taken
        self._now = 0.0  # virtual time at which the piece that began last was due
        self._numbers = itertools.count()

    def add(self, owner: Hashable, piece: _Piece) -> None:
        """Add a piece of work to its owner's queue."""
        line = self._lines.get(owner)
        if line is None:
            line = self._lines[owner] = _Line(start=self._now)
        elif not line.pieces and not line.is_running:
            line.start = max(line.start, self._now)
        line.pieces.append((next(self._numbers), piece))
        self._waiting += 1

    def take(self) -> tuple[Hashable, _Piece] | None:
        """Remove the next piece that may run, and return it together with its owner.

        Return ``None`` if no piece may run now.  Call :meth:`finish` when the piece is done.
        """
        if not self._waiting:
            return None
        ready = [
            (line.start, line.pieces[0][0], owner)
            for owner, line in self._lines.items()
            if line.pieces and not line.is_running and self._has_place(line)
        ]
        if not ready:
            return None
        _, _, owner = min(ready, key=lambda entry: entry[:2])
        line = self._lines[owner]
        self._now = max(self._now, line.start)
        line.is_running = True
        line.is_beside = self._running == self._places
        if line.is_beside:
            self._is_beside = True
        else:
            self._running += 1
        self._waiting -= 1
        return owner, line.pieces.popleft()[1]

    def finish(self, owner: Hashable, seconds: float) -> None:
        """Record that an owner's running piece is done, and that it took ``seconds``.

        It counts as at least :data:`LEAST_COUNTED`.
        """
        line = self._lines[owner]
        line.is_running = False
        line.start += max(seconds, LEAST_COUNTED)
        line.longest = max(seconds, (line.longest or 0.0) * _FADING)
        if line.is_beside:
            self._is_beside = line.is_beside = False
        else:
            self._running -= 1
        if not self._running and not self._is_beside and not self._waiting:
            self._now = max(line.start for line in self._lines.values())  # all are level again
        if len(self._lines) > _MOST_IDLE:
            self._lines = {k: line for k, line in self._lines.items() if self._is_needed(line)}

    def remove(self, owner: Hashable, piece: _Piece) -> bool:
        """Remove a waiting piece of work; return ``False`` if it has already started."""
        line = self._lines.get(owner)
        number = next((n for n, own in line.pieces if own is piece), None) if line else None
        if line is None or number is None:
            return False
        line.pieces.remove((number, piece))
        self._waiting -= 1
        return True

    def _is_needed(self, line: _Line[_Piece]) -> bool:
        return bool(line.pieces) or line.is_running or line.start > self._now

    def _has_place(self, line: _Line[_Piece]) -> bool:
        if self._running < self._places:
            return True
        is_short = line.longest is not None and line.longest <= SHORT
        return is_short and not self._is_beside


@dataclass(kw_only=True, eq=False)
class _Work:
    function: Callable[[], object]
    future: asyncio.Future[Any]


class Turns:
    """A scheduler that runs pieces of work in threads, in the order of a :class:`FairQueue`.

    A waiting piece does not occupy a thread.  Use a scheduler from one event loop only.  ``places``
    is the number of pieces that may run at the same time, by default one for each core that the
    process may use.  ``name`` begins the names of the threads.  ``clock`` is a monotonic clock in
    seconds.
    """

    def __init__(
        self,
        places: int | None = None,
        *,
        name: str = "splitonnx",
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        places = places or count_cores()
        self._queue: FairQueue[_Work] = FairQueue(places)
        self._threads = ThreadPoolExecutor(places + 1, thread_name_prefix=name)
        self._clock = clock
        self._waiting: dict[asyncio.Future[Any], tuple[Hashable, _Work]] = {}

    def run(self, owner: Hashable, function: Callable[[], _Result]) -> asyncio.Future[_Result]:
        """Run a function in a thread when it is the owner's turn.

        The returned future receives the function's result.  If the future is cancelled before the
        function starts, the function does not run; if it is already running, it finishes.
        """
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        work = _Work(function=function, future=future)
        self._waiting[future] = (owner, work)
        future.add_done_callback(self._forget)
        self._queue.add(owner, work)
        self._begin()
        return future

    def withdraw(self, future: asyncio.Future[Any]) -> bool:
        """Remove a waiting piece of work; return ``False`` if it has already started."""
        if future not in self._waiting:
            return False
        future.cancel()
        self._forget(future)
        return True

    def close(self) -> None:
        """Wait until the running pieces are done, then stop the threads."""
        self._threads.shutdown()

    def _begin(self) -> None:
        loop = asyncio.get_running_loop()
        while (taken := self._queue.take()) is not None:
            owner, work = taken
            del self._waiting[work.future]
            self._threads.submit(self._work, loop, owner, work)  # which raises nothing

    def _forget(self, future: asyncio.Future[Any]) -> None:
        if future in self._waiting:  # it was cancelled before its turn
            self._queue.remove(*self._waiting.pop(future))

    def _work(self, loop: asyncio.AbstractEventLoop, owner: Hashable, work: _Work) -> None:
        begun = self._clock()
        result: object = None
        error: BaseException | None = None
        try:
            result = work.function()
        except BaseException as raised:  # noqa: BLE001 - it is the waiting side's
            error = raised
        seconds = self._clock() - begun
        loop.call_soon_threadsafe(self._end, owner, work, seconds, result, error)

    def _end(
        self,
        owner: Hashable,
        work: _Work,
        seconds: float,
        result: object,
        error: BaseException | None,
    ) -> None:
        self._queue.finish(owner, seconds)
        if not work.future.done():
            if error is None:
                work.future.set_result(result)
            else:
                work.future.set_exception(error)
        self._begin()
