"""A server's connection within limits: how much may arrive, how fast and how slowly.

Built on the protocol object of websockets: a limit holds before bytes are kept, not after.  Who
may come in is decided by :mod:`admissions`; what the messages say is not known here.
"""

from __future__ import annotations

import asyncio
from functools import partial
from http import HTTPStatus

from websockets.asyncio.server import Server, ServerConnection
from websockets.exceptions import PayloadTooBig, ProtocolError
from websockets.frames import CloseCode, Frame, Opcode
from websockets.protocol import OPEN, Event
from websockets.server import ServerProtocol

from splitonnx.runtime.edge.admissions import Admission
from splitonnx.runtime.edge.http import STATUSES, Refusal, deny
from splitonnx.runtime.edge.rate_limits import Timers, TokenBucket
from splitonnx.runtime.edge.tokens import Identity

REQUEST_BYTES = 16 << 10
"""Bytes of a handshake's HTTP request."""
MAX_FRAGMENTS = 4096
"""Fragments of one message; each costs some microseconds, however little it holds."""
KEPT_BYTES = 16 << 20
"""Bytes of unread messages of one connection, over which its sender has to wait."""
LOST_SECONDS = 60.0
"""Seconds without a byte, not even the answer to a ping, after which nobody is there any more."""
CLOSE_SECONDS = 5.0
"""Seconds that the other side has to close a connection that was ended here."""
DISMISS_SECONDS = 1.0
"""Seconds that it has where another connection waits for its place."""
ANSWER_SECONDS = 300.0
"""Seconds in which a long HTTP answer has to be taken, which is kept in memory until then."""
ANSWER_CHECKS = 10
"""Times in between at which as large a share of it must have been taken as of the time."""

_TLS_HELLO = b"\x16\x03"


class LimitedConnection(ServerConnection):
    """One connection, held to the limits; ``identity`` is ``None`` until a token was shown."""

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
        self._bytes = 0  # received in all
        self.kept = 0  # bytes of messages that nobody has taken yet
        self._frames = 0  # since the bucket was last looked at
        self._fragments = 0  # of the message under way
        self.is_underway = False  # whether part of a message has come
        self._heard = self.loop.time()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin, with the limits that hold until a token was shown."""
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
        """End, and make room for another."""
        self._timers.stop_all()
        self._admission.leave(self)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read, within what may come before a token, and as fast as is allowed."""
        if not self._bytes and data.startswith(_TLS_HELLO):
            # an answer in HTTP makes TLS on the other side say what is wrong
            self.refuse(Refusal.TLS, CloseCode.PROTOCOL_ERROR, "this server speaks no TLS")
            return
        self._bytes += len(data)
        self._heard = self.loop.time()
        if self.owner is None and self._bytes > REQUEST_BYTES + self._limits.unauthenticated_bytes:
            self.refuse(
                Refusal.MESSAGE_TOO_BIG, CloseCode.MESSAGE_TOO_BIG, "too much before a token"
            )
            return
        # of a request there are no frames to wait for
        before = self._frames if self.request else -1
        super().data_received(data)
        if self.protocol.close_expected():
            self._note_fault()
            self._timers.start("hang up", CLOSE_SECONDS, self.transport.abort)
        if self.request is None:  # the handshake has its own deadline
            return
        protocol = self.protocol
        self.is_underway = (
            self._frames == before
            or protocol.current_size is not None
            or bool(protocol.reader.buffer)
        )
        self._watch()
        wait = self._bucket.count(self._frames, self._heard)
        self._frames = 0
        if wait:
            self._pause("pace")
            self._timers.start("pace", wait, partial(self._resume, "pace"))

    def process_event(self, event: Event) -> None:
        """Count frames, and what is kept of them."""
        super().process_event(event)
        if not isinstance(event, Frame):
            return
        self._frames += 1
        if event.opcode in (Opcode.TEXT, Opcode.BINARY, Opcode.CONT):
            self._fragments += 1
            self.kept += len(event.data)
            if self.kept > KEPT_BYTES:
                self._pause("kept")
            if event.fin:
                self._fragments = 0
                self._timers.stop("message")
            elif self._fragments > MAX_FRAGMENTS:
                reason = f"more than {MAX_FRAGMENTS} fragments"
                self.refuse(Refusal.TOO_MANY_FRAGMENTS, CloseCode.MESSAGE_TOO_BIG, reason)

    @property
    def owner(self) -> str | None:
        """Whose connection it is; ``None`` until a token was shown."""
        return None if self.identity is None else self.identity.owner

    def become_client(self, identity: Identity) -> None:
        """Lift the limits that hold before a token was shown."""
        self.identity = identity
        self.protocol.max_message_size = self._limits.message_bytes
        self._timers.stop("login")

    def take(self, size: int) -> None:
        """Count so many bytes of messages as taken over by somebody else."""
        self.kept -= size
        if self.kept <= KEPT_BYTES and "kept" in self._pauses:
            self._resume("kept")

    def open(self) -> None:
        """Note that the handshake is done, and wait for a token unless one was shown."""
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
        """Leave the time to take a long HTTP answer, as long as it is taken steadily."""
        self._timers.stop("handshake")
        self.close_timeout = ANSWER_SECONDS
        self._check_pace(size, ANSWER_SECONDS - ANSWER_SECONDS / ANSWER_CHECKS)

    def _check_pace(self, size: int, left: float) -> None:
        """Cut off who has not taken its share of an answer by the next check."""
        pause = ANSWER_SECONDS / ANSWER_CHECKS

        def check() -> None:
            if self.transport.get_write_buffer_size() > size * left / ANSWER_SECONDS:
                self.cut_off(Refusal.REPLY_TOO_SLOW)
            else:
                self._check_pace(size, left - pause)

        self._timers.start("answer", pause, check)

    def refuse(self, refusal: Refusal, code: int, reason: str) -> None:
        """End the connection from this side, without waiting for the other."""
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
            self.transport.abort()  # what was written has gone out; no farewell is waited for
        else:
            self.transport.close()
            self._timers.start("hang up", CLOSE_SECONDS, self.transport.abort)

    def cut_off(self, refusal: Refusal) -> None:
        """End the connection at once: its other side does not read."""
        if self.refusal is None:
            self.refusal = refusal
            self._admission.on_refusal(refusal, self.name)
        self.transport.abort()

    def dismiss(self, code: int, reason: str) -> None:
        """Close the connection with a reason, or at once where the other side does not read."""
        if self.protocol.state is OPEN and not self.transport.get_write_buffer_size():
            self.protocol.fail(code, reason)
            self.send_data()
            self._timers.start("dismiss", DISMISS_SECONDS, self.transport.abort)
        else:
            self.transport.abort()

    def _listen(self) -> None:
        """Hang up on who has gone without a word.

        Any byte is a sign of life: on a slow link the answer to a ping waits behind a message.
        While this side does not read, it hears nothing, and cannot tell.
        """
        if self._pauses:
            self._heard = self.loop.time()
        silence = self.loop.time() - self._heard
        if silence >= LOST_SECONDS:
            self.transport.abort()
        else:
            self._timers.start("listen", LOST_SECONDS - silence, self._listen)

    def _note_fault(self) -> None:
        """Return why the parser gave up, if it did."""
        reason = self.protocol.parser_exc
        if self.refusal is None and isinstance(reason, PayloadTooBig | ProtocolError):
            big = isinstance(reason, PayloadTooBig)
            self.refusal = Refusal.MESSAGE_TOO_BIG if big else Refusal.BROKEN_FRAME
            self._admission.on_refusal(self.refusal, self.name)

    def _watch(self) -> None:
        """Run the message's deadline while one is under way and this side is reading."""
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
