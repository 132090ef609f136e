"""Sending a message's replies, one after the other, while the work on the next one continues.

It knows neither what a reply says nor how it is sent.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

from splitonnx.runtime.server.ledgers import Reply


class ReplySender:
    """Sends replies in their order, for use from one event loop; ``send`` sends one.

    A reply that cannot be sent ends the sending: those that follow are dropped, and
    :attr:`sending` has the error.
    """

    def __init__(self, send: Callable[[Reply], Coroutine[Any, Any, None]]) -> None:
        self.sending: asyncio.Task[None] | None = None
        """What is done once every reply so far was sent; ``None`` before the first."""
        self._send = send
        self._waiting: deque[Reply] = deque()
        self._is_over = False

    def put(self, reply: Reply) -> None:
        """Send a reply as soon as those before it are gone."""
        if self._is_over:
            return
        self._waiting.append(reply)
        if self.sending is None or (self.sending.done() and not self._has_failed(self.sending)):
            self.sending = asyncio.create_task(self._send_waiting())

    def cancel(self) -> None:
        """Send nothing any more; an error that nobody asked for is forgotten."""
        self._is_over = True
        if self.sending is not None and not self.sending.cancel():
            self._has_failed(self.sending)  # or the loop would report an error that nobody saw

    async def _send_waiting(self) -> None:
        while self._waiting:
            await self._send(self._waiting.popleft())

    @staticmethod
    def _has_failed(sending: asyncio.Task[None]) -> bool:
        return sending.cancelled() or sending.exception() is not None
