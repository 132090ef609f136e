"""A connection whose messages are sent by a thread while the client computes.

Received messages need none: the websockets library reads ahead in a thread of its own.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from contextlib import suppress

from splitonnx.codecs import Chunk
from splitonnx.errors import ConnectionLost, SplitonnxError
from splitonnx.interrupts import check_interrupt
from splitonnx.runtime.wire.transports import Transport

MOST_WAITING = 16
"""Most messages that wait to be sent."""
POLL_SECONDS = 0.25
"""Seconds between two looks at whether Ctrl-C was pressed, while too many messages wait."""
CLOSE_SECONDS = 5.0
"""Longest time in seconds that closing waits until the last messages were sent."""


class BackgroundSending:
    """A connection that sends in a thread; see :class:`transports.Transport`.

    :meth:`send` returns before the message was sent, so do not change its chunks.  If a message
    cannot be sent, the connection is closed, and the next call tells why.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._waiting: queue.Queue[Sequence[Chunk] | None] = queue.Queue(MOST_WAITING)
        self._failure: SplitonnxError | None = None
        self._thread = threading.Thread(target=self._send_all, name="splitonnx-send", daemon=True)
        self._thread.start()

    @property
    def bytes_sent(self) -> int:
        """Return the number of bytes of messages that were sent."""
        return self._transport.bytes_sent

    @property
    def bytes_received(self) -> int:
        """Return the number of bytes of messages that were received."""
        return self._transport.bytes_received

    def send(self, chunks: Sequence[Chunk]) -> None:
        """Send ``chunks``, one after the other, as a single message, while the caller continues.

        Raises:
            ConnectionLost: an earlier message could not be sent.
        """
        while True:
            self._check()
            check_interrupt()
            with suppress(queue.Full):
                self._waiting.put(chunks, timeout=POLL_SECONDS)
                return

    def receive(self) -> Chunk | bytearray:
        """Wait for the next message and return it.

        Raises:
            ConnectionLost: the connection has ended, or no message arrived in time.
        """
        try:
            return self._transport.receive()
        except ConnectionLost:
            self._check()  # why the connection was closed
            raise

    def close(self) -> None:
        """Close the connection after what waits was sent, if that takes no longer than 5 s."""
        if self._failure is None:
            with suppress(queue.Full):
                self._waiting.put(None, timeout=CLOSE_SECONDS)
            self._thread.join(CLOSE_SECONDS)
        self._transport.close()

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _send_all(self) -> None:
        while (chunks := self._waiting.get()) is not None:
            try:
                self._transport.send(chunks)
            except SplitonnxError as error:
                self._failure = error
                self._transport.close()  # the caller may be waiting for a reply
                return
