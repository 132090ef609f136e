"""A connection whose messages are sent by tasks of the event loop while the caller computes.

Received messages need none: the websockets library reads ahead.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from splitonnx.codecs import Chunk
from splitonnx.errors import ConnectionLost, SplitonnxError
from splitonnx.runtime.channels.asynchronous.transports import AsyncTransport

MOST_WAITING = 16
"""Most messages that wait to be sent."""
CLOSE_SECONDS = 5.0
"""Longest time in seconds that closing waits until the last messages were sent."""


class QueuedSending:
    """A connection that sends in the background; see :class:`transports.AsyncTransport`.

    :meth:`send` returns before the message was sent, so do not change its chunks.  If a message
    cannot be sent, the connection is closed, and the next call tells why.
    """

    def __init__(self, transport: AsyncTransport) -> None:
        self._transport = transport
        self._waiting: set[asyncio.Task[None]] = set()
        self._turn = asyncio.Lock()  # which tasks get in the order in which they were made
        self._failure: SplitonnxError | None = None

    async def send(self, chunks: Sequence[Chunk]) -> None:
        """Send ``chunks``, one after the other, as a single message, while the caller continues.

        Raises:
            ConnectionLost: an earlier message could not be sent.
        """
        while len(self._waiting) >= MOST_WAITING:
            await asyncio.wait(self._waiting, return_when=asyncio.FIRST_COMPLETED)
        self._check()
        task = asyncio.create_task(self._send(chunks))
        self._waiting.add(task)
        task.add_done_callback(self._waiting.discard)

    async def receive(self) -> Chunk | bytearray:
        """Wait for the next message and return it.

        Raises:
            ConnectionLost: the connection has ended, or no message arrived in time.
        """
        try:
            return await self._transport.receive()
        except ConnectionLost:
            self._check()  # why the connection was closed
            raise

    async def close(self) -> None:
        """Close the connection after what waits was sent, if that takes no longer than 5 s."""
        try:
            if self._waiting:
                await asyncio.wait(self._waiting, timeout=CLOSE_SECONDS)
        except asyncio.CancelledError:
            self.abort()
            raise
        if not self._waiting:
            await self._transport.close()
            return
        self.abort()
        await asyncio.wait(self._waiting)

    def abort(self) -> None:
        """Close the connection at once; what waits is not sent."""
        for task in self._waiting:
            task.cancel()
        self._transport.abort()

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    async def _send(self, chunks: Sequence[Chunk]) -> None:
        async with self._turn:
            if self._failure is None:
                try:
                    await self._transport.send(chunks)
                except SplitonnxError as error:
                    self._failure = error
                    self._transport.abort()  # the caller may be waiting for a reply
