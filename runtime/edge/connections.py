"""A server's connection, with limits on the size, rate and duration of a client's messages.

:class:`LimitedConnection` extends the connection class of the websockets library, so that the
limits apply before data are buffered.  :mod:`admissions` decides who may connect.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from http import HTTPStatus

from websockets.asyncio.server import Server, ServerConnection
from websockets.exceptions import PayloadTooBig, ProtocolError
from websockets.frames import CloseCode, Frame, Opcode
from websockets.protocol import OPEN, Event
from websockets.server import ServerProtocol

from splitonnx.codecs import Chunk
from splitonnx.runtime.edge.admissions import Admission
from splitonnx.runtime.edge.http import STATUSES, Refusal, deny
from splitonnx.runtime.edge.rate_limits import Timers, TokenBucket
from splitonnx.runtime.edge.tokens import Identity
from splitonnx.runtime.wire.fragments import JoinedFragments
from splitonnx.runtime.wire.payloads import DATA_FRAMES, read_payloads, write_fragments

REQUEST_BYTES = 16 << 10
"""Largest HTTP request of a handshake, in bytes."""
MAX_FRAGMENTS = 4096
"""Most fragments of one message; each costs some microseconds, however small it is."""
KEPT_BYTES = 16 << 20
"""Bytes of unread messages above which the server stops reading from a connection."""
LOST_SECONDS = 60.0
"""Seconds without any data, not even a pong, after which the client is considered gone."""
CLOSE_SECONDS = 5.0
"""Seconds that the other side has to answer the closing handshake."""
DISMISS_SECONDS = 1.0
"""Seconds that a client has to answer the closing handshake if the server dismisses it."""
ANSWER_SECONDS = 300.0
"""Seconds within which a long HTTP response must be read; it stays in memory until then."""
ANSWER_CHECKS = 10
"""How many times in that period the server checks that enough of the response has been read."""

_TLS_HELLO = b"\x16\x03"


class LimitedConnection(ServerConnection, asyncio.BufferedProtocol):
    """A connection that limits what the client may send and how long it may take.

    ``identity`` is ``None`` until the client has been admitted.
    """

    def __init__(
        self,
        admission: Admission,
        protocol: ServerProtocol,
        server: Server,
        *,
        ping_interval: float | None,
        ping_timeout: float | None,
        close_timeout: float | None,
        max_queue: int | tuple[int | None, int | None] | None,
        write_limit: int | tuple[int, int | None],
    ) -> None:
        super().__init__(
            protocol,
            server,
            ping_interval=ping_interval,
            ping_timeout=ping_timeout,
            close_timeout=close_timeout,
            max_queue=max_queue,
            write_limit=write_limit,
        )
        self.identity: Identity | None = None
        self.refusal: Refusal | None = None
        self.name = "somebody"
        self._admission = admission
        self._limits = admission.limits
        self._bucket = TokenBucket(admission.limits.messages_per_second, self.loop.time())
        self._timers = Timers(self.loop)
        self._pauses: set[str] = set()
        self._bytes = 0  # received in total
        self._is_direct = False  # whether bytes are being received into the reader's memory
        self.kept = 0  # bytes of unread messages
        self._most_kept = KEPT_BYTES
        self._frames = 0  # since the last call of the bucket
        self._fragments = 0  # of the message being received
        self._arriving = self._expect_message()
        self._messages: deque[Chunk | bytearray] = deque()  # complete and unread
        self._on_begin: Callable[[], object] | None = None  # while the server waits for a message
        self._reader = read_payloads(protocol, lambda *sizes: self._arriving.place(*sizes))
        self.is_underway = False  # whether part of a message has arrived
        self._heard = self.loop.time()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start the connection with the limits that apply until the client has shown a token."""
        super().connection_made(transport)
        self.recv_messages.pause = partial(self._pause, "queue")
        self.recv_messages.resume = partial(self._resume, "queue")
        address = transport.get_extra_info("peername")
        if address:
            self.name = f"{address[0]}:{address[1]}"
        self._admission.quota.release(transport.get_extra_info("socket").fileno())
        self._admission.enter(self)
        reason = f"no whole request within {self._limits.handshake_seconds:g} s"
        self._timers.start(
            "handshake",
            self._limits.handshake_seconds,
            partial(self.refuse, Refusal.HANDSHAKE_TOO_SLOW, CloseCode.POLICY_VIOLATION, reason),
        )

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop the timers, and no longer count the connection."""
        self._timers.stop_all()
        self._admission.leave(self)
        super().connection_lost(exc)

    def get_buffer(self, sizehint: int) -> memoryview:
        """Return the memory to receive into: that of a large payload, if one is underway."""
        self._is_direct = bool(self._reader.gap)
        return (self._is_direct and self._reader.gap) or self._admission.scratch

    def buffer_updated(self, nbytes: int) -> None:
        """Process bytes that were received into the memory from :meth:`get_buffer`."""
        if not self._is_direct:
            self.data_received(bytes(self._admission.scratch[:nbytes]))
            return
        self._reader.fill(nbytes)
        is_admitted = self.owner is not None and self.protocol.state is OPEN
        if self._reader.gap and is_admitted:  # nothing else can have happened
            self._bytes += nbytes
            self._heard = self.loop.time()
            return
        self._receive(b"", nbytes)

    def data_received(self, data: bytes) -> None:
        """Process received bytes, and enforce the limits on their size and rate."""
        if not self._bytes and data.startswith(_TLS_HELLO):
            # an HTTP response makes the client's TLS library report the actual problem
            self.refuse(Refusal.TLS, CloseCode.PROTOCOL_ERROR, "this server speaks no TLS")
            return
        self._receive(data, len(data))

    def _receive(self, data: bytes, size: int) -> None:
        """Process ``size`` received bytes: ``data``, or bytes that the reader has already."""
        self._bytes += size
        self._heard = self.loop.time()
        if self.owner is None and self._bytes > REQUEST_BYTES + self._limits.unauthenticated_bytes:
            self.refuse(
                Refusal.MESSAGE_TOO_BIG, CloseCode.MESSAGE_TOO_BIG, "too much before a token"
            )
            return
        # an HTTP request has no frames
        before = self._frames if self.request else -1
        super().data_received(data)
        if self.protocol.close_expected():
            self._note_fault()
            self._timers.start("hang up", CLOSE_SECONDS, self.transport.abort)
        if self.request is None:  # the handshake has its own deadline
            return
        protocol = self.protocol
        self.is_underway = (
            self._frames == before or protocol.current_size is not None or self._reader.is_underway
        )
        self._watch()
        wait = self._bucket.count(self._frames, self._heard)
        self._frames = 0
        if wait:
            self._pause("pace")
            self._timers.start("pace", wait, partial(self._resume, "pace"))

    def process_event(self, event: Event) -> None:
        """Process a received frame.

        If there are too many unread bytes, reading pauses.  If a message has too many fragments,
        the client is refused.
        """
        if isinstance(event, Frame):
            self._frames += 1
        if not isinstance(event, Frame) or event.opcode not in DATA_FRAMES:
            super().process_event(event)
            return
        self._fragments += 1
        self._arriving.add(event.data)
        self.kept += len(event.data)
        if self._on_begin is not None:
            self._on_begin()
            self.kept -= len(event.data)
        if self.kept > self._most_kept:
            self._pause("kept")
        if event.fin:
            self._fragments = 0
            self._timers.stop("message")
            self._end_message()
            super().process_event(Frame(Opcode.BINARY, b""))  # the library counts the messages
        elif self._fragments > MAX_FRAGMENTS:
            reason = f"more than {MAX_FRAGMENTS} fragments"
            self.refuse(Refusal.TOO_MANY_FRAGMENTS, CloseCode.MESSAGE_TOO_BIG, reason)

    def _expect_message(self) -> JoinedFragments:
        return JoinedFragments(self._admission.buffers, self.protocol.max_message_size)

    def _end_message(self) -> None:
        content = self._arriving.join()
        self._messages.append(content)
        self._arriving = self._expect_message()
        if self._on_begin is not None:  # what comes next is not waited for
            self.kept += len(content)
            self._on_begin = None

    async def receive(self, on_begin: Callable[[], object]) -> Chunk | bytearray:
        """Wait for the next message and return it; call ``on_begin`` as its fragments arrive.

        Raises:
            ConnectionClosed: the connection has ended.
        """
        if not self._messages:
            self._on_begin = on_begin
            if self._fragments:
                on_begin()
            self._take(self._arriving.size)
        try:
            await self.recv(decode=False)  # it only tells that there is one
        finally:
            if self._on_begin is not None:  # it has not come
                self._on_begin = None
                self.kept += self._arriving.size
        content = self._messages.popleft()
        self._take(len(content))
        return content

    async def send_fragments(self, fragments: Sequence[memoryview]) -> None:
        """Send a message in fragments, after any message that is being sent.

        Do not cancel this, unless the connection is closed then.

        Raises:
            ConnectionClosed: the connection has ended.
        """
        while self.send_in_progress is not None:
            await asyncio.shield(self.send_in_progress)
        await write_fragments(self, fragments)

    @property
    def owner(self) -> str | None:
        """Return the owner of the client's token or certificate, or ``None`` before admission.

        The result is ``""`` if the client was admitted without a token or certificate.
        """
        return None if self.identity is None else self.identity.owner

    def become_client(self, identity: Identity) -> None:
        """Record the client's identity, and lift the limits on unauthenticated connections."""
        self.identity = identity
        self.protocol.max_message_size = self._limits.message_bytes
        self._timers.stop("login")

    def _take(self, size: int) -> None:
        """Record that the server has read ``size`` bytes, and resume receiving if possible."""
        self.kept -= size
        if self.kept <= self._most_kept and "kept" in self._pauses:
            self._resume("kept")

    def read_ahead(self, size: int) -> None:
        """Allow ``size`` bytes more than ``KEPT_BYTES`` to wait unread; the largest size counts."""
        self._most_kept = max(self._most_kept, KEPT_BYTES + size)
        self._take(0)

    def open(self) -> None:
        """Record that the handshake is complete, and set a time limit for showing a token.

        There is no such time limit for a client that has already been admitted.  From now on, the
        connection is also closed if nothing arrives for too long.
        """
        self._timers.stop("handshake")
        self._listen()
        if self.owner is not None:
            return
        reason = f"no token within {self._limits.login_seconds:g} s"
        self._timers.start(
            "login",
            self._limits.login_seconds,
            partial(self.refuse, Refusal.NO_TOKEN, CloseCode.POLICY_VIOLATION, reason),
        )

    def wait_for_answer(self, size: int) -> None:
        """Allow the client more time to read a long HTTP response, as long as it keeps reading.

        ``size`` is the size of the response in bytes.
        """
        self._timers.stop("handshake")
        self.close_timeout = ANSWER_SECONDS
        self._check_pace(size, ANSWER_SECONDS - ANSWER_SECONDS / ANSWER_CHECKS)

    def _check_pace(self, size: int, left: float) -> None:
        """Disconnect the client if it has not read its share of a response by the next check."""
        pause = ANSWER_SECONDS / ANSWER_CHECKS

        def check() -> None:
            if self.transport.get_write_buffer_size() > size * left / ANSWER_SECONDS:
                self.cut_off(Refusal.REPLY_TOO_SLOW)
            else:
                self._check_pace(size, left - pause)

        self._timers.start("answer", pause, check)

    def refuse(self, refusal: Refusal, code: int, reason: str) -> None:
        """Close the connection without waiting; send ``code`` and ``reason`` if possible.

        ``refusal`` is the reason that the server records.
        """
        if self.refusal is not None or self.transport.is_closing():
            return
        self.refusal = refusal
        self._admission.on_refusal(refusal, self.name)
        if self.protocol.state is OPEN:
            self.protocol.fail(code, reason)
            self.send_data()
        elif self.request is None:
            status = STATUSES.get(refusal, HTTPStatus.SERVICE_UNAVAILABLE)
            self.transport.write(deny(status, reason).serialize())
        if self.owner is None:
            self.transport.abort()  # all data was sent; do not wait for the other side
        else:
            self.transport.close()
            self._timers.start("hang up", CLOSE_SECONDS, self.transport.abort)

    def cut_off(self, refusal: Refusal) -> None:
        """Abort the connection immediately, and record ``refusal`` as the reason."""
        if self.refusal is None:
            self.refusal = refusal
            self._admission.on_refusal(refusal, self.name)
        self.transport.abort()

    def dismiss(self, code: int, reason: str) -> None:
        """Send the reason and close the connection, or abort it if the client is not reading."""
        if self.protocol.state is OPEN and not self.transport.get_write_buffer_size():
            self.protocol.fail(code, reason)
            self.send_data()
            self._timers.start("dismiss", DISMISS_SECONDS, self.transport.abort)
        else:
            self.transport.abort()

    def _listen(self) -> None:
        """Close the connection if nothing has arrived for too long.

        Any byte counts as a sign of life, because on a slow network a pong may wait behind a
        message.  While the server itself does not read, it cannot know whether the client is gone.
        """
        if self._pauses:
            self._heard = self.loop.time()
        silence = self.loop.time() - self._heard
        if silence >= LOST_SECONDS:
            self.transport.abort()
        else:
            self._timers.start("listen", LOST_SECONDS - silence, self._listen)

    def _note_fault(self) -> None:
        """Report the error that stopped the parser, if there was an error."""
        reason = self.protocol.parser_exc
        if self.refusal is None and isinstance(reason, PayloadTooBig | ProtocolError):
            big = isinstance(reason, PayloadTooBig)
            self.refusal = Refusal.MESSAGE_TOO_BIG if big else Refusal.BROKEN_FRAME
            self._admission.on_refusal(self.refusal, self.name)

    def _watch(self) -> None:
        """Run the time limit of a message while the message arrives and the server is reading."""
        if not self.is_underway or self._pauses:
            self._timers.stop("message")
        elif "message" not in self._timers:
            reason = f"a message took longer than {self._limits.message_seconds:g} s"
            self._timers.start(
                "message",
                self._limits.message_seconds,
                partial(self.refuse, Refusal.MESSAGE_TOO_SLOW, CloseCode.GOING_AWAY, reason),
            )

    def _pause(self, reason: str) -> None:
        self._pauses.add(reason)
        self.transport.pause_reading()
        self._timers.stop("message")

    def _resume(self, reason: str) -> None:
        self._pauses.discard(reason)
        if not self._pauses and not self.transport.is_closing():
            self.transport.resume_reading()
            self._watch()
