"""A client's websocket connection on an event loop that limits buffering and follows no redirects.

:mod:`bounded_connections` does the same in threads, and says why.  Other modules handle time limits
and the contents of messages.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Sequence
from functools import partial

from websockets.asyncio.client import ClientConnection
from websockets.client import ClientProtocol
from websockets.datastructures import HeadersLike
from websockets.exceptions import ConnectionClosed, InvalidHandshake
from websockets.frames import CloseCode, Frame, Opcode
from websockets.http11 import USER_AGENT
from websockets.protocol import OPEN, Event

from splitonnx.codecs import Chunk
from splitonnx.runtime.channels.bounded_connections import (
    MAX_FRAGMENTS,
    READ_AHEAD,
    STALL_SECONDS,
    Stalled,
    make_stall,
    raise_handshake,
)
from splitonnx.runtime.wire.buffers import BufferPool
from splitonnx.runtime.wire.fragments import JoinedFragments
from splitonnx.runtime.wire.payloads import DATA_FRAMES, read_payloads, write_fragments

HANG_UP_SECONDS = 5.0
"""Seconds that the server has to end a connection that this side has refused to continue."""
MOST_UNSENT = 8 << 20
"""Bytes that may wait to be sent: a message's fragments go one by one, answers to pings do not."""


class BoundedAsyncConnection(ClientConnection):
    """A client's connection that buffers at most ``READ_AHEAD`` bytes plus one message.

    A message that is still arriving counts only while nobody waits for it.  Therefore, a message
    that is waited for is always read to its end, even if it is larger than ``READ_AHEAD``.

    A server that takes nothing of what is sent for ``STALL_SECONDS`` is lost; :meth:`limit_sending`
    changes that time.  So is one for which more than ``MOST_UNSENT`` bytes wait.
    """

    def __init__(
        self,
        protocol: ClientProtocol,
        *,
        ping_interval: float | None,
        ping_timeout: float | None,
        close_timeout: float | None,
        max_queue: int | tuple[int | None, int | None] | None,
        write_limit: int | tuple[int, int | None],
    ) -> None:
        super().__init__(
            protocol,
            ping_interval=ping_interval,
            ping_timeout=ping_timeout,
            close_timeout=close_timeout,
            max_queue=max_queue,
            write_limit=write_limit,
        )
        self._pauses: set[str] = set()
        self._is_over = False  # this side closes the connection, and no message counts any more
        self._hanging_up: asyncio.TimerHandle | None = None
        self._stall_seconds = STALL_SECONDS
        self._stalled: asyncio.TimerHandle | None = None  # while what is sent has to wait
        self._written = 0  # bytes that were handed to the transport
        self._is_awaited = False
        self._whole = 0  # bytes of complete messages that were not taken yet
        self._fragments = 0  # of the message that is arriving
        self._messages: deque[Chunk | bytearray] = deque()
        self._buffers = BufferPool()
        self._arriving = self._expect_message()
        self._reader = read_payloads(protocol, lambda *sizes: self._arriving.place(*sizes))

    @property
    def waiting_bytes(self) -> int:
        """Return the size in bytes of the complete messages that the caller has not read yet."""
        return self._whole

    def limit_sending(self, seconds: float) -> None:
        """Set for how long the server may take nothing of what is sent."""
        self._stall_seconds = seconds

    @property
    def is_underway(self) -> bool:
        """Return whether part of a message has arrived."""
        return self.protocol.current_size is not None or self._reader.is_underway

    async def handshake(
        self,
        additional_headers: HeadersLike | None = None,
        user_agent_header: str | None = USER_AGENT,
    ) -> None:
        """Perform the opening handshake without hiding TLS errors or following redirects.

        Raises:
            ssl.SSLError: the server rejects the client's certificate.
            Redirected: the server answers with a redirect.
        """
        try:
            await super().handshake(additional_headers, user_agent_header)
        except (InvalidHandshake, ConnectionClosed) as error:
            raise_handshake(error, self.connection_exc)
            raise

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start the connection."""
        super().connection_made(transport)
        self.recv_messages.pause = partial(self._pause, "frames")
        self.recv_messages.resume = partial(self._resume, "frames")

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop waiting for the server to end the connection, or to take what is sent."""
        for timer in (self._hanging_up, self._stalled):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Process received bytes; if they end the connection, the server must close it in time."""
        super().data_received(data)
        if self.transport.get_write_buffer_size() > MOST_UNSENT:
            self._give_up(Stalled("the server does not take the answers to its pings"))
        if self.protocol.close_expected() and self._hanging_up is None:
            self._hanging_up = self.loop.call_later(HANG_UP_SECONDS, self.transport.abort)

    def process_event(self, event: Event) -> None:
        """Process a received frame, and pause reading if there are too many unread bytes."""
        if not isinstance(event, Frame) or event.opcode not in DATA_FRAMES:
            super().process_event(event)
            return
        self._arriving.add(event.data)
        self._fragments += 1
        if event.fin:
            content = self._arriving.join()
            self._arriving, self._fragments = self._expect_message(), 0
            if self._is_over:
                return
            self._messages.append(content)
            self._whole += len(content)
            super().process_event(Frame(Opcode.BINARY, b""))  # the library counts the messages
        elif self._fragments >= MAX_FRAGMENTS:
            self._refuse_fragments()
        unread = self._whole if self._is_awaited else self._whole + self._arriving.size
        if unread > READ_AHEAD:
            self._pause("bytes")

    def send_data(self) -> None:
        """Write what waits to the transport."""
        self._written += sum(map(len, self.protocol.writes))
        super().send_data()

    def pause_writing(self) -> None:
        """Stop sending until the server takes more, which it has to do in time."""
        super().pause_writing()
        self._watch()

    def resume_writing(self) -> None:
        """Continue to send."""
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()

    def _watch(self) -> None:
        self._stalled = self.loop.call_later(
            self._stall_seconds, self._check_progress, self._count_taken()
        )

    def _check_progress(self, taken: int) -> None:
        if self._count_taken() > taken:
            self._watch()
        else:
            self._give_up(make_stall(self._stall_seconds))

    def _count_taken(self) -> int:
        return self._written - self.transport.get_write_buffer_size()

    def _give_up(self, error: Stalled) -> None:
        self.set_connection_exc(error)
        self.transport.abort()

    async def receive(self) -> Chunk | bytearray:
        """Wait for the next message and return it; if this is cancelled, no message is lost.

        Raises:
            ConnectionClosed: the connection has ended.
        """
        self._is_awaited = True
        if self._whole <= READ_AHEAD:
            self._resume("bytes")
        try:
            await self.recv(decode=False)  # it only tells that there is one
        finally:
            self._is_awaited = False
        content = self._messages.popleft()
        self._whole -= len(content)
        if self._whole <= READ_AHEAD:
            self._resume("bytes")
        return content

    async def send_fragments(self, fragments: Sequence[memoryview]) -> None:
        """Send a message in fragments, which are masked one after the other.

        If this is cancelled, the connection is of no more use.

        Raises:
            ConnectionClosed: the connection has ended.
        """
        await write_fragments(self, fragments)

    async def close(
        self, code: CloseCode | int = CloseCode.NORMAL_CLOSURE, reason: str = ""
    ) -> None:
        """Close the connection; skip the closing handshake if too much is unread, or unsent."""
        self._is_over = True
        if self._pauses or self.paused:
            self.transport.abort()
        await super().close(code, reason)

    def _expect_message(self) -> JoinedFragments:
        return JoinedFragments(self._buffers, self.protocol.max_message_size)

    def _refuse_fragments(self) -> None:
        if self.protocol.state is OPEN:
            self.protocol.fail(CloseCode.MESSAGE_TOO_BIG, "too many fragments")
            self.send_data()
            self.transport.close()

    def _pause(self, reason: str) -> None:
        if not self._is_over:  # what ends the connection is read
            self._pauses.add(reason)
            self.transport.pause_reading()

    def _resume(self, reason: str) -> None:
        self._pauses.discard(reason)
        if not self._pauses and not self.transport.is_closing():
            self.transport.resume_reading()
