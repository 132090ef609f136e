"""The memory budget for tasks: how much is reserved, who waits for memory, and who gets it next.

A task reserves its memory before it begins, and waits if there is not enough.  Owners take turns
(start-time fair queuing): among the waiting owners, the owner that was granted memory the fewest
times comes first.  If there is not enough memory for its task, the tasks behind it wait too.  A new
owner, or an owner that returns after a pause, starts level with the others.  While others wait, an
owner gets at most half of the memory.

Besides the shared memory there is a *reserve*, an eighth of its size.  It is only for owners that
have no memory yet, so that small tasks need not wait for an owner that has all the shared memory.

An open task whose client sends nothing is *idle*.  While others wait, the memory of an idle task
can be taken back after ``IDLE_SECONDS``, or after ``UPLOAD_SECONDS`` if its client is still sending
a message.  If the number of workers is limited, tasks also wait for a worker (:mod:`places`).

This module only keeps records and completes the futures of waiting tasks: the caller defines what a
task is, and aborts tasks.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Collection, Hashable
from dataclasses import dataclass

from splitonnx.errors import ServerBusy, TaskTooLarge
from splitonnx.runtime.scheduling.growths import Growths, TaskKind
from splitonnx.runtime.scheduling.places import Places

IDLE_SECONDS = 10.0
"""Seconds that a client may be silent during a task while other tasks wait for memory."""
UPLOAD_SECONDS = 60.0
"""Seconds that a client may take to send its next message while other tasks wait for memory."""
RESERVE = 8
"""The reserve, for owners without memory, is the total memory divided by this number."""
_MOST_REMEMBERED = 1024
"""Most owners whose grants are counted; above that, owners that do not wait are forgotten."""

Task = tuple[str, str]
"""The key of a task's memory: the name of its session, and its phase."""


@dataclass(kw_only=True, eq=False)
class _Reservation:
    owner: Hashable
    kind: TaskKind
    size: int
    needed: int  # requested by its messages so far
    is_reserve: bool = False
    idle_since: float | None = None


@dataclass(kw_only=True, eq=False)
class _Request:
    task: Task
    owner: Hashable
    kind: TaskKind
    size: int
    future: asyncio.Future[None] | None = None

    @property
    def is_over(self) -> bool:
        return self.future is None or self.future.done()


class Budget:
    """Memory that the tasks of all sessions share; use it from one event loop only.

    ``total`` is the size of the memory in bytes.  ``workers`` is the number of users that may have
    tasks at the same time, or ``None`` for no limit.  A user is an owner, or a session without an
    owner.  Methods take an owner as a string; any other object means that the session has no owner.
    ``is_there`` returns whether a user still has a session.  ``clock`` is a monotonic clock in
    seconds.
    """

    def __init__(
        self,
        total: int,
        *,
        workers: int | None = None,
        is_there: Callable[[Hashable], bool] = lambda _: True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total = total
        self._places = None
        if workers is not None:
            self._places = Places(workers, is_there=is_there, clock=clock)
        self._growths = Growths(is_there)
        self._clock = clock
        self._held: dict[Task, _Reservation] = {}
        self._waiting: list[_Request] = []  # in the order of arrival
        self._shares: dict[Hashable, int] = {}  # how many times each owner was granted memory
        self._level = 0  # the share at which owners that arrive or return start

    @property
    def used(self) -> int:
        """Return how many bytes of the shared memory are in use, not counting the reserve."""
        return sum(held.size for held in self._held.values() if not held.is_reserve)

    @property
    def holders(self) -> tuple[Task, ...]:
        """Return the tasks that have memory."""
        return tuple(self._held)

    def check(self, size: int) -> None:
        """Check that a task of ``size`` bytes is not too large for the budget.

        Raises:
            TaskTooLarge: ``size`` is over the limit; the error contains both numbers.
        """
        if size > self.total:
            raise TaskTooLarge(size, self.total)

    def ask(self, task: Task, owner: Hashable, size: int) -> asyncio.Future[None]:
        """Request memory for a new task; the returned future is done once the memory is granted.

        If similar tasks of this user recently needed more memory than ``size``, that larger amount
        is requested.  If an earlier task of the same session and phase is still open, ``task``
        takes over its memory if there is enough of it; otherwise, that memory is freed at once.
        Therefore, if :meth:`lacks` returns true, abort the earlier task before this call.  Cancel
        the future to withdraw the request.

        Raises:
            TaskTooLarge: ``size`` is over the limit.
        """
        self.check(size)
        kind = _find_kind(task, owner, size)
        size = self._growths.foresee(kind)
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        held = self._held.get(task)
        if held is not None and held.size >= size:
            self._growths.end(held.kind, held.needed)
            held.kind, held.needed, held.idle_since = kind, kind.first, None
            future.set_result(None)
            return future
        self.release(task)
        if not self._waiting and not self._held:
            self._shares.clear()
        self._shares[owner] = max(self._shares.get(owner, 0), self._level)
        self._waiting.append(_Request(task=task, owner=owner, kind=kind, size=size, future=future))
        future.add_done_callback(self._note_end)
        self._give()
        return future

    def lacks(self, task: Task, owner: Hashable, size: int) -> bool:
        """Return whether an earlier task has memory, but less than :meth:`ask` would request.

        The earlier task has the same session and phase as ``task``, and is still open.
        """
        held = self._held.get(task)
        needed = self._growths.foresee(_find_kind(task, owner, size))
        return held is not None and held.size < needed

    def extend(self, task: Task, owner: Hashable, size: int) -> None:
        """Record that an open task continues and now needs ``size`` bytes; never wait for memory.

        A task is refused if it needs more memory than is left, or more than its owner's share while
        others wait.  The task does not wait, because two open tasks that wait for more memory could
        block each other forever.  The client may then begin the task again, which requests ``size``
        bytes from the start.

        Raises:
            TaskTooLarge: ``size`` is over the limit.
            ServerBusy: not enough memory is left, or the owner has reached its share while others
                wait.
        """
        self.check(size)
        held = self._held.get(task)
        before = 0 if held is None else held.size
        growth = max(size - before, 0)
        if held is not None:
            held.needed = max(held.needed, size)
            self._growths.note(held.kind, size)
        if growth or held is None:
            kind = _find_kind(task, owner, size) if held is None else held.kind
            moved = before if held is not None and held.is_reserve else 0
            request = _Request(task=task, owner=owner, kind=kind, size=growth)
            if self.used + moved + growth > self.total or self._is_over_share(request):
                raise ServerBusy("memory for tasks that grow after their first message")
            held = _Reservation(owner=owner, kind=kind, size=before + growth, needed=size)
            self._held[task] = held
        held.idle_since = None

    def pause(self, task: Task) -> None:
        """Record that an open task is waiting for its client's next message."""
        if task in self._held:
            self._held[task].idle_since = self._clock()

    def release(self, task: Task) -> None:
        """Free the memory of a task, if it has any."""
        held = self._held.pop(task, None)
        if held is not None:
            self._growths.end(held.kind, held.needed)
            self._give()

    def list_idle(self, is_sending: Callable[[Task], bool] = lambda _: False) -> list[Task]:
        """List the idle tasks that may be aborted to free memory, the longest idle first.

        The list is empty if no task waits for memory.  ``is_sending`` returns whether the first
        part of a task's next message has already arrived.  If so, the task is listed only once it
        has been idle for ``UPLOAD_SECONDS``, not for ``IDLE_SECONDS``.
        """
        self._give()  # a user's tenure may be over by now
        if not self._waiting:
            return []
        now = self._clock()
        idle = []
        for task, held in self._held.items():
            if held.idle_since is None or now - held.idle_since < IDLE_SECONDS:
                continue
            if now - held.idle_since >= UPLOAD_SECONDS or not is_sending(task):
                idle.append((held.idle_since, task))
        return [task for _, task in sorted(idle, key=lambda entry: entry[0])]

    def _note_end(self, future: asyncio.Future[None]) -> None:
        """Grant the requests that waited behind a withdrawn request."""
        if future.cancelled():
            self._give()

    def _give(self) -> None:
        """Grant waiting requests in order, as long as there is enough memory."""
        if not self._waiting:
            return
        self._waiting = [request for request in self._waiting if not request.is_over]
        while (found := self._find_next()) is not None:
            request, is_reserve = found
            self._waiting.remove(request)
            self._level = max(self._level, self._shares[request.owner])
            self._shares[request.owner] += 1
            self._held[request.task] = _Reservation(
                owner=request.owner,
                kind=request.kind,
                size=request.size,
                needed=request.kind.first,
                is_reserve=is_reserve,
            )
            assert request.future is not None
            request.future.set_result(None)
        if len(self._shares) > _MOST_REMEMBERED:
            owners = {request.owner for request in self._waiting}
            self._shares = {owner: n for owner, n in self._shares.items() if owner in owners}

    def _find_next(self) -> tuple[_Request, bool] | None:
        """Return the next request to grant, and whether it uses the reserve.

        If the number of places is limited, also assign a place to the request's user.
        """
        if not self._waiting:
            return None
        used, is_blocked = self.used, False
        at_work = self._list_at_work()
        leaving = self._find_leaving(at_work)
        for request in sorted(self._waiting, key=lambda r: self._shares[r.owner]):
            user = _name_user(request.task, request.owner)
            if self._is_over_share(request) or (leaving is not None and user == leaving):
                continue
            # nobody passes a request for more shared memory than is left
            is_blocked = is_blocked or used + request.size > self.total
            if is_blocked and not self._fits_reserve(request):
                continue
            if self._places is None or self._places.take(user, at_work):
                return request, is_blocked
        return None

    def _list_at_work(self) -> set[Hashable]:
        if self._places is None:
            return set()
        return {_name_user(task, held.owner) for task, held in self._held.items()}

    def _find_leaving(self, at_work: Collection[Hashable]) -> Hashable:
        if self._places is None:
            return None
        waiting = [_name_user(request.task, request.owner) for request in self._waiting]
        return self._places.find_leaving(waiting, at_work)

    def _fits_reserve(self, request: _Request) -> bool:
        if any(held.owner == request.owner for held in self._held.values()):
            return False
        taken = sum(held.size for held in self._held.values() if held.is_reserve)
        return taken + request.size <= self.total // RESERVE

    def _is_over_share(self, request: _Request) -> bool:
        own = sum(held.size for held in self._held.values() if held.owner == request.owner)
        others_wait = any(other.owner != request.owner for other in self._waiting)
        return others_wait and own > 0 and own + request.size > self.total // 2


def _find_kind(task: Task, owner: Hashable, size: int) -> TaskKind:
    return TaskKind(user=_name_user(task, owner), phase=task[1], first=size)


def _name_user(task: Task, owner: Hashable) -> Hashable:
    """Return the user whose worker a task needs: its owner, or its session if it has no owner."""
    return owner if isinstance(owner, str) else task[0]
