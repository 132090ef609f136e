"""A queue that sends a connection's replies in order while later replies are being computed."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine, Hashable
from dataclasses import dataclass
from typing import Any

from splitonnx.messages import Message, TaskKey, Tensors
from splitonnx.runtime.server.ledgers import Reply


@dataclass(eq=False, kw_only=True)
class ReplyGroup:
    """The replies to one run of a task, which count as one while they are unread.

    ``turn`` is the number of the newest message that they answer.
    """

    task: TaskKey
    turn: int


class ReplySender:
    """A queue of replies that are sent in order with the function ``send``.

    Use the queue from one event loop only.  If a reply cannot be sent, all later replies are
    dropped, and :meth:`wait` raises the error.
    """

    def __init__(self, send: Callable[[Reply], Coroutine[Any, Any, None]]) -> None:
        self._send = send
        self._sending: asyncio.Task[None] | None = None
        self._unsent: deque[tuple[Reply, Hashable]] = deque()  # the first one is being sent
        self._progress = asyncio.Event()  # set once a reply was sent, and replaced then
        self._is_over = False

    @property
    def unsent(self) -> int:
        """Return of how many groups there are replies that were not sent whole yet."""
        return len({group for _, group in self._unsent})

    def find_group(self, message: Message) -> Hashable:
        """Return the group of the replies to a message.

        It is that of the unread replies to earlier messages of the same task.  A message that
        begins a task, also one that began before, and one that comes again have groups of their
        own: otherwise, a client could make any number of replies wait by one task.
        """
        if not isinstance(message, Tensors):
            return object()
        for _, group in reversed(self._unsent):
            if isinstance(group, ReplyGroup) and group.task == message.key:
                if group.turn >= message.turn:
                    break
                group.turn = message.turn
                return group
        return ReplyGroup(task=message.key, turn=message.turn)

    def put(self, reply: Reply, group: Hashable = None) -> None:
        """Add a group's reply, which is sent as soon as all earlier replies have been sent.

        Without a group, it is one of its own.
        """
        if self._is_over:
            return
        self._unsent.append((reply, object() if group is None else group))
        if self._sending is None or (self._sending.done() and not self._has_failed(self._sending)):
            self._sending = asyncio.create_task(self._send_all())

    async def wait(self, most: int = 0) -> None:
        """Wait until there are unsent replies of at most ``most`` groups.

        Raises:
            ConnectionLost: as raised by ``send``.
        """
        while self.unsent > most and self._sending is not None:
            if self._sending.done():
                self._sending.result()
            await self._progress.wait()

    def cancel(self) -> None:
        """Stop sending, drop the replies that have not been sent, and ignore any earlier error."""
        self._is_over = True
        if self._sending is not None and not self._sending.cancel():
            self._has_failed(self._sending)  # otherwise asyncio would report the error as unread

    async def _send_all(self) -> None:
        try:
            while self._unsent:
                await self._send(self._unsent[0][0])
                self._unsent.popleft()
                self._note_progress()
        finally:
            asyncio.get_running_loop().call_soon(self._note_progress)  # when this task is done

    def _note_progress(self) -> None:
        self._progress.set()
        self._progress = asyncio.Event()

    @staticmethod
    def _has_failed(sending: asyncio.Task[None]) -> bool:
        return sending.cancelled() or sending.exception() is not None
