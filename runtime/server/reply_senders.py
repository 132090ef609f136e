"""A queue that sends the replies to a message in order while later replies are being computed."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

from splitonnx.runtime.server.ledgers import Reply


class ReplySender:
    """A queue of replies that are sent in order with the function ``send``.

    Use the queue from one event loop only.  If a reply cannot be sent, all later replies are
    dropped, and the asyncio task :attr:`sending` ends with the error.
    """

    def __init__(self, send: Callable[[Reply], Coroutine[Any, Any, None]]) -> None:
        self.sending: asyncio.Task[None] | None = None
        """The task that sends all replies so far; ``None`` before the first reply."""
        self._send = send
        self._waiting: deque[Reply] = deque()
        self._is_over = False

    def put(self, reply: Reply) -> None:
        """Add a reply, which is sent as soon as all earlier replies have been sent."""
        if self._is_over:
            return
        self._waiting.append(reply)
        if self.sending is None or (self.sending.done() and not self._has_failed(self.sending)):
            self.sending = asyncio.create_task(self._send_waiting())

    def cancel(self) -> None:
        """Stop sending, drop the replies that have not been sent, and ignore any earlier error."""
        self._is_over = True
        if self.sending is not None and not self.sending.cancel():
            self._has_failed(self.sending)  # otherwise asyncio would report the error as unread

    async def _send_waiting(self) -> None:
        while self._waiting:
            await self._send(self._waiting.popleft())

    @staticmethod
    def _has_failed(sending: asyncio.Task[None]) -> bool:
        return sending.cancelled() or sending.exception() is not None
