"""What the connections of a server share: sessions, turns, memory, and who attends what.

It gives up the open tasks of silent clients while others wait for their memory.  What a connection
does is its own business (:mod:`handlers`).
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from typing import Protocol
from weakref import WeakValueDictionary

from splitonnx.runtime.edge.tokens import Tokens
from splitonnx.runtime.engine.estimates import Estimates
from splitonnx.runtime.scheduling.budgets import Budget, Task
from splitonnx.runtime.scheduling.turns import Turns
from splitonnx.runtime.server.metrics import Metrics
from splitonnx.runtime.server.registries import Registry
from splitonnx.runtime.wire.close_codes import RESTART


class Holder(Protocol):
    """A session's newest connection."""

    @property
    def is_sending(self) -> bool:
        """Return whether a message, or part of one, has come from its client and is not read."""

    def dismiss(self, code: int, reason: str) -> None:
        """End the connection without waiting; the other side is told why, if it reads."""


@dataclass(kw_only=True, eq=False)
class ServerContext:
    """What the connections of a server share; ``stop`` is set once it is to end, ``halt`` once it
    is to end without waiting for steps that run.

    ``compute`` gives turns to what runs stages, ``storage`` to what reads and writes the disk, so
    that greetings and saving do not wait for steps.  ``locks`` and ``holders`` are by session: who
    may touch it, and whose connection is its newest.  ``waiting`` names the sessions whose lock is
    held by a message for which nothing runs: it waits for memory, or its reply for a reader.
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

    def give_up_idle(self) -> None:
        """Abort open tasks whose clients keep others waiting for memory; they can begin again."""
        assert self.budget is not None
        sessions = {session.id: session for session in self.registry.sessions}
        for task in self.budget.list_idle(self._is_sending):
            name, phase = task
            session, lock = sessions.get(name), self.locks.get(name)
            if lock is not None and lock.locked() and name not in self.waiting:
                continue  # its next message has just come
            if session is not None and phase in session.open_phases:
                session.abandon()
                holder = self.holders.get(name)
                if holder is not None:
                    holder.dismiss(RESTART, "others wait for the memory of its step")
            self.budget.release(task)

    def _is_sending(self, task: Task) -> bool:
        holder = self.holders.get(task[0])
        return holder is not None and holder.is_sending
