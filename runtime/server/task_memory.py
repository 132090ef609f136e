"""Memory for a connection's tasks, which is reserved before a task and released after it.

The budget divides memory among owners, and the estimates compute how much a task needs.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Hashable, Iterator
from contextlib import contextmanager, suppress

from splitonnx.errors import ConnectionLost, ServerBusy, TaskTooLarge
from splitonnx.messages import TaskKey, Tensors
from splitonnx.names import ACCUMULATE, PREDICT, SHARE, STEP_PHASES, TRAIN, UPDATE
from splitonnx.runtime.edge.websockets import Peer
from splitonnx.runtime.scheduling.budgets import IDLE_SECONDS, Task
from splitonnx.runtime.server.contexts import ServerContext
from splitonnx.runtime.server.sessions import Session
from splitonnx.runtime.wire.close_codes import RESTART


class TaskMemory:
    """The memory that is reserved for the tasks of one connection.

    The asyncio task ``gone`` is done when the connection has ended, and the asyncio task
    ``stopping`` is done when the server begins to stop.
    """

    def __init__(
        self,
        context: ServerContext,
        peer: Peer,
        *,
        gone: asyncio.Task[None],
        stopping: asyncio.Task[bool],
    ) -> None:
        self._context = context
        self._peer = peer
        self._gone = gone
        self._stopping = stopping
        self._needed: dict[TaskKey, int] = {}  # of the open tasks of a step of micro-batches

    async def reserve(
        self, session: Session, owner: Hashable, message: Tensors, needed: int
    ) -> None:
        """Reserve ``needed`` bytes for a message's task.

        The first message of a task waits until the memory is available, the connection ends or the
        server stops.  Later messages do not wait, and neither do tasks that are begun while others
        of their step have memory; all open tasks of a phase together have one reservation.  Clients
        whose batches make one step have their memory at the same time; a client that gets none
        because all others wait for it is refused.

        Raises:
            ConnectionLost: the connection ended or the server is stopping; the message is dropped.
            ServerBusy: the task needs more memory for a later message than is left.
            TaskTooLarge: the task, or those of a joint step together, need more memory than the
                limit allows.
        """
        budget, task = self._context.budget, (session.id, message.phase)
        if budget is None or message.phase == SHARE:  # a share runs no stage
            return
        needed = self._add_open(session, message.key, needed)
        if message.turn > 0 or _continues_step(session, message):
            budget.extend(task, owner, needed)  # the task has its memory already, or is not open
            return
        is_joint = message.phase in (TRAIN, ACCUMULATE) and session.is_joint
        if is_joint:
            with suppress(ServerBusy):  # other tasks may end, unless they wait for this one
                budget.extend(task, owner, needed)
                return
        # A task that begins again and needs more memory loses what it has, so it is aborted.
        if budget.lacks(task, owner, needed):
            session.give_up(message.phase)
        granted = budget.ask(task, owner, needed)
        try:
            with self.letting_go(session):
                while not granted.done() and not (self._gone.done() or self._stopping.done()):
                    self._context.give_up_idle()
                    if is_joint and self._await_this_one(budget.holders):
                        raise TaskTooLarge(budget.used + needed, budget.total)
                    await asyncio.wait(
                        (granted, self._gone, self._stopping),
                        timeout=IDLE_SECONDS / 10,
                        return_when=asyncio.FIRST_COMPLETED,
                    )
        finally:
            if not granted.done():
                granted.cancel()
        if granted.cancelled():
            if self._stopping.done():
                await self._peer.close(RESTART, "the server restarts")
            raise ConnectionLost(self._peer.name, "it ended before its task had its memory")

    def _add_open(self, session: Session, key: TaskKey, needed: int) -> int:
        """Return what a task needs together with the other open tasks of its step and phase.

        The replies that are kept of the step's finished tasks count, too.
        """
        if key.phase not in (ACCUMULATE, UPDATE):
            return needed
        known = self._needed
        self._needed = {other: known[other] for other in session.open_tasks if other in known}
        self._needed[key] = max(needed, known.get(key, 0))
        own = sum(size for other, size in self._needed.items() if other.phase == key.phase)
        return own + (session.ledger.kept_bytes if key.micro_batch else 0)

    def _await_this_one(self, holders: Collection[Task]) -> bool:
        """Return whether all tasks that have memory wait for other clients."""
        waiting = {found.id for found in self._context.registry.sessions if found.awaits_others}
        return all(name in waiting for name, _ in holders)

    def settle(self, session: Session | None) -> None:
        """Release the memory of finished tasks, and mark open tasks as idle."""
        budget = self._context.budget
        if budget is None or session is None:
            return
        open_phases = session.open_phases
        for phase in (*STEP_PHASES, PREDICT):
            if phase in open_phases and session.awaits_others:
                continue  # its client is not silent
            if phase in open_phases:
                budget.pause((session.id, phase))
            else:
                budget.release((session.id, phase))

    @contextmanager
    def letting_go(self, session: Session | None) -> Iterator[None]:
        """Allow a session's open tasks to be aborted within a ``with`` block.

        Use this while the connection's handler holds the session's lock, but is only waiting for
        memory or for the client to read a reply.  Without this, the lock protects the tasks from
        being aborted.
        """
        if session is None:
            yield
            return
        self._context.waiting.add(session.id)
        try:
            yield
        finally:
            self._context.waiting.discard(session.id)


def _continues_step(session: Session, message: Tensors) -> bool:
    """Return whether a task is begun while tasks before it in its step may have memory.

    It does not wait then: those tasks may need messages that come after its own.
    """
    if message.phase == UPDATE:
        return any(key != message.key for key in session.open_tasks)
    return message.phase == ACCUMULATE and message.micro_batch > 0
