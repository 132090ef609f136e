"""The state shared by all connections of a server, such as sessions, threads and memory.

This module aborts the open tasks of silent clients if other clients are waiting for memory.
:mod:`handlers` contains the code for a single connection.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Any, Protocol
from weakref import WeakValueDictionary

from splitonnx.runtime.edge.tokens import Tokens
from splitonnx.runtime.engine.estimates import Estimates
from splitonnx.runtime.scheduling.budgets import Budget, Task
from splitonnx.runtime.scheduling.turns import Turns
from splitonnx.runtime.server.metrics import Metrics
from splitonnx.runtime.server.policies.tasks import Delivery
from splitonnx.runtime.server.registries import Registry
from splitonnx.runtime.wire.close_codes import RESTART


class Holder(Protocol):
    """The interface of a session's newest connection."""

    @property
    def is_sending(self) -> bool:
        """Return whether a message, or part of one, has arrived but has not been handled yet."""

    def dismiss(self, code: int, reason: str) -> None:
        """Close the connection without waiting; send the reason if the client is reading.

        ``code`` is the websocket close code.
        """

    def deliver(self, delivery: Delivery) -> None:
        """Send the reply that another session's task caused, without waiting."""


@dataclass(kw_only=True, eq=False)
class ServerContext:
    """The state shared by all connections of a server.

    ``stop`` is set when the server should stop, and ``halt`` when it should stop without waiting
    for running steps.  ``compute`` schedules threads that run stages.  ``storage`` schedules
    threads that use the disk, so that greetings and saving do not wait for steps.  ``locks``
    contains the lock of each session, and ``holders`` contains the newest connection of each
    session.  ``waiting`` contains the names of sessions whose lock is held by a handler that is
    only waiting for memory, or for the client to read a reply.  ``norm``, ``batch`` and
    ``estimates`` are passed to each connection's :class:`~dispatchers.Dispatcher`.
    """

    registry: Registry
    compute: Turns
    storage: Turns
    metrics: Metrics
    stop: asyncio.Event
    tokens: Tokens | None = None
    norm: float | None = None
    batch: int | None = None
    estimates: Estimates | None = None
    budget: Budget | None = None
    halt: asyncio.Event = field(default_factory=asyncio.Event)
    locks: WeakValueDictionary[str, asyncio.Lock] = field(default_factory=WeakValueDictionary)
    holders: dict[str, Holder] = field(default_factory=dict)
    waiting: set[str] = field(default_factory=set)

    def lock(self, session: str) -> asyncio.Lock:
        """Return the lock of a session; whoever works on the session holds it."""
        lock = self.locks.get(session)
        if lock is None:
            lock = self.locks[session] = asyncio.Lock()
        return lock

    async def wait_unless_halted(self, awaited: asyncio.Future[Any], seconds: float) -> None:
        """Wait up to ``seconds``, unless the server stops without waiting for running steps."""
        halting = asyncio.create_task(self.halt.wait())
        try:
            await asyncio.wait(
                (awaited, halting), timeout=seconds, return_when=asyncio.FIRST_COMPLETED
            )
        finally:
            halting.cancel()

    def give_up_idle(self) -> None:
        """Abort open tasks of silent clients if other clients are waiting for memory.

        The silent clients can start their tasks again later.
        """
        assert self.budget is not None
        sessions = {session.id: session for session in self.registry.sessions}
        for task in self.budget.list_idle(self._is_sending):
            name, phase = task
            session, lock = sessions.get(name), self.locks.get(name)
            if lock is not None and lock.locked() and name not in self.waiting:
                continue  # its next message has just arrived
            if session is not None and phase in session.open_phases:
                session.abandon()
                holder = self.holders.get(name)
                if holder is not None:
                    holder.dismiss(RESTART, "others wait for the memory of its step")
            self.budget.release(task)

    def _is_sending(self, task: Task) -> bool:
        holder = self.holders.get(task[0])
        return holder is not None and holder.is_sending
