"""A client's websocket connection that limits buffering and does not follow redirects.

The websockets library reads ahead in a separate thread.  The library limits the number of buffered
frames, but not their size.  This module limits the number of buffered bytes.  It also joins the
frames of a message in that thread, each as it arrives, so that the library only counts messages.
Other modules handle time limits and the contents of messages.
"""

from __future__ import annotations

import socket
import ssl
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, cast

from websockets.client import ClientProtocol
from websockets.datastructures import HeadersLike
from websockets.exceptions import (
    ConcurrencyError,
    ConnectionClosed,
    InvalidHandshake,
    InvalidStatus,
)
from websockets.frames import CloseCode, Frame, Opcode
from websockets.protocol import OPEN, Event
from websockets.sync.client import ClientConnection

from splitonnx.codecs import Chunk
from splitonnx.errors import Redirected
from splitonnx.runtime.channels.direct_sockets import DirectSocket
from splitonnx.runtime.wire.buffers import BufferPool
from splitonnx.runtime.wire.fragments import JoinedFragments
from splitonnx.runtime.wire.payloads import DATA_FRAMES, read_payloads, write_fragment

READ_AHEAD = 16 << 20
"""Bytes of unread messages above which reading from the socket pauses."""
MAX_FRAGMENTS = 4096
"""Most fragments of one message."""
READ_BYTES = 1 << 18
"""Bytes that are read from the socket at a time; four times the library's number."""
STALL_SECONDS = 600.0
"""Longest time in seconds for which the server may take nothing of what is being sent to it."""


class Stalled(TimeoutError):
    """The server takes nothing of what this side sends."""


class BoundedConnection(ClientConnection):
    """A client's connection that buffers at most ``READ_AHEAD`` bytes plus one message.

    A message that is still arriving counts only while nobody waits for it.  Therefore, a message
    that is waited for is always read to its end, even if it is larger than ``READ_AHEAD``.

    A server that takes nothing of what is sent for ``STALL_SECONDS`` is lost; :meth:`limit_sending`
    changes that time.
    """

    recv_bufsize = READ_BYTES

    def __init__(self, sock: socket.socket, protocol: ClientProtocol, **settings: Any) -> None:
        self._flow_mutex = threading.Lock()
        self._pauses: set[str] = set()
        self._is_over = False  # this side closes the connection, and no message counts any more
        self._is_awaited = False
        self._whole = 0  # bytes of complete messages that were not taken yet
        self._fragments = 0  # of the message that is arriving
        self._messages: deque[Chunk | bytearray] = deque()
        self._most = protocol.max_message_size
        self._buffers = BufferPool()
        self._arriving = JoinedFragments(self._buffers, self._most)
        self._reader = read_payloads(protocol, lambda *sizes: self._arriving.place(*sizes))
        self._connected = sock
        self.limit_sending(STALL_SECONDS)
        if not isinstance(sock, ssl.SSLSocket):
            sock = cast("socket.socket", DirectSocket(sock, self._reader))
        super().__init__(sock, protocol, **settings)
        self.recv_messages.pause = lambda: self._pause("frames")
        self.recv_messages.resume = lambda: self._resume("frames")

    @property
    def waiting_bytes(self) -> int:
        """Return the size in bytes of the complete messages that the caller has not read yet."""
        return self._whole

    def limit_sending(self, seconds: float) -> None:
        """Set for how long the server may take nothing of what is sent.

        The library reads only where a poll says that there is something, so a socket's time limit
        counts for sending alone, and for a record of TLS of which only a part has arrived.
        """
        self._stall_seconds = seconds
        with suppress(OSError):  # already closed
            self._connected.settimeout(seconds)

    def handshake(
        self,
        additional_headers: HeadersLike | None = None,
        user_agent_header: str | None = None,
        timeout: float | None = None,
    ) -> None:
        """Perform the opening handshake without hiding TLS errors or following redirects.

        With TLS 1.3, the server checks a client's certificate only after the client has finished
        its side of the TLS handshake, so the server's TLS error may arrive during the opening
        handshake. Following a redirect would send the handshake, and with it the client's
        credentials, to an address that the user did not choose.

        Raises:
            ssl.SSLError: the server rejects the client's certificate.
            Redirected: the server answers with a redirect.
        """
        try:
            super().handshake(additional_headers, user_agent_header, timeout)
        except (InvalidHandshake, ConnectionClosed) as error:
            raise_handshake(error, self.connection_exc)
            raise

    @property
    def is_underway(self) -> bool:
        """Return whether part of a message has arrived; another thread writes that value."""
        return self.protocol.current_size is not None or self._reader.is_underway

    def send_fragments(self, fragments: Sequence[memoryview]) -> None:
        """Send a message in fragments, which are masked one after the other.

        Raises:
            ConnectionClosed: the connection has ended.
            ConcurrencyError: another thread is sending a message.
        """
        last = len(fragments) - 1
        for number, fragment in enumerate(fragments):
            with self.send_context():
                if self.send_in_progress and number == 0:
                    raise ConcurrencyError("another thread is sending a message")
                self.send_in_progress = number < last
                write_fragment(
                    self.protocol, fragment, is_first=number == 0, is_last=number == last
                )

    def send_data(self) -> None:
        """Send what waits; if that ends early, end the connection, since a frame is incomplete.

        Other threads that want to send wait for this one, so it must not wait without end.
        """
        try:
            super().send_data()
        except BaseException as error:  # Ctrl-C, too
            is_stall = isinstance(error, TimeoutError) and error.errno is None
            if is_stall or not isinstance(error, Exception):
                self._shut_down()
            if is_stall:
                raise make_stall(self._stall_seconds) from error
            raise

    def receive(self, timeout: float) -> Chunk | bytearray:
        """Wait for the next message and return it.

        Raises:
            TimeoutError: it was not complete within ``timeout`` seconds.
            ConnectionClosed: the connection has ended.
        """
        with self._flow_mutex:
            self._is_awaited = True
            if self._whole <= READ_AHEAD:
                self._drop_pause("bytes")
        try:
            self.recv(timeout, decode=False)  # it only tells that there is one
        except TimeoutError:
            if self.protocol.close_expected():  # the server had time to end what is over
                self.close_socket()
            raise
        finally:
            self._is_awaited = False
        content = self._messages.popleft()
        with self._flow_mutex:
            self._whole -= len(content)
            if self._whole <= READ_AHEAD:
                self._drop_pause("bytes")
        return content

    def process_event(self, event: Event) -> None:
        """Process a received frame, and pause reading if there are too many unread bytes."""
        if not isinstance(event, Frame) or event.opcode not in DATA_FRAMES:
            super().process_event(event)
            return
        self._arriving.add(event.data)
        self._fragments += 1
        if event.fin:
            content = self._arriving.join()
            self._arriving, self._fragments = JoinedFragments(self._buffers, self._most), 0
            if self._is_over:
                return
            self._messages.append(content)
            with self._flow_mutex:
                self._whole += len(content)
            super().process_event(Frame(Opcode.BINARY, b""))  # the library counts the messages
        elif self._fragments >= MAX_FRAGMENTS:
            self._refuse_fragments()
        with self._flow_mutex:
            unread = self._whole if self._is_awaited else self._whole + self._arriving.size
            if unread > READ_AHEAD:
                self._add_pause("bytes")

    def _refuse_fragments(self) -> None:
        with self.protocol_mutex:
            if self.protocol.state is OPEN:
                self.protocol.fail(CloseCode.MESSAGE_TOO_BIG, "too many fragments")
                self.send_data()

    def close(self, code: CloseCode | int = CloseCode.NORMAL_CLOSURE, reason: str = "") -> None:
        """Close the connection; skip the closing handshake if there is too much unread data."""
        with self._flow_mutex:
            is_paused, self._is_over = bool(self._pauses), True  # what still comes is not kept
        if is_paused or not self._may_send():
            self.close_socket()
        else:
            super().close(code, reason)

    def _may_send(self) -> bool:
        """Wait for another thread that is sending, and return whether it is done in time."""
        if self.close_timeout is None:
            return True
        self.limit_sending(self.close_timeout)  # for those that begin now
        if not self.protocol_mutex.acquire(timeout=self.close_timeout):
            return False
        self.protocol_mutex.release()
        return True

    def close_socket(self) -> None:
        """Close the socket, and wake the threads that read from it or send, so that they end."""
        self._shut_down()
        with self._flow_mutex:
            self._is_over = True
            for reason in tuple(self._pauses):
                self._drop_pause(reason)
        super().close_socket()

    def _shut_down(self) -> None:
        with suppress(OSError):  # already closed
            # not the method of TLS, after which another thread could send without encryption
            socket.socket.shutdown(self._connected, socket.SHUT_RDWR)

    def _pause(self, reason: str) -> None:
        with self._flow_mutex:
            self._add_pause(reason)

    def _resume(self, reason: str) -> None:
        with self._flow_mutex:
            self._drop_pause(reason)

    def _add_pause(self, reason: str) -> None:
        if self._is_over:
            return
        if not self._pauses:
            self.recv_flow_control.acquire()
        self._pauses.add(reason)

    def _drop_pause(self, reason: str) -> None:
        if reason in self._pauses:
            self._pauses.remove(reason)
            if not self._pauses:
                self.recv_flow_control.release()


def make_stall(seconds: float) -> Stalled:
    """Return the error that says for how long the server took nothing."""
    return Stalled(f"the server took nothing of a message within {seconds:g} s")


def raise_handshake(error: Exception, cause: BaseException | None) -> None:
    """Raise what a failed handshake hides: ``cause``, if it is an error of TLS, or a redirect.

    Raises:
        ssl.SSLError: the server rejects the client's certificate.
        Redirected: the server answers with a redirect.
    """
    if isinstance(cause, ssl.SSLError):
        raise cause from error
    if isinstance(error, InvalidStatus) and 300 <= error.response.status_code < 400:
        target = ", ".join(error.response.headers.get_all("Location"))
        raise Redirected(error.response.status_code, target) from error
