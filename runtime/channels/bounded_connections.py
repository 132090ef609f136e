"""A client's websocket connection that limits buffering and does not follow redirects.

The websockets library reads ahead in a separate thread.  The library limits the number of buffered
frames, but not their size.  This module limits the number of buffered bytes.  Other modules handle
time limits and the contents of messages.
"""

from __future__ import annotations

import ssl
import threading
from typing import Any

from websockets.datastructures import HeadersLike
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus
from websockets.frames import CloseCode, Frame, Opcode
from websockets.protocol import Event
from websockets.sync.client import ClientConnection

from splitonnx.errors import Redirected

READ_AHEAD = 16 << 20
"""Bytes of complete unread messages above which reading from the socket pauses."""

_DATA = (Opcode.TEXT, Opcode.BINARY, Opcode.CONT)


class BoundedConnection(ClientConnection):
    """A client's connection that buffers at most ``READ_AHEAD`` bytes plus one message.

    Only complete messages count towards the limit.  Therefore, a message that is still arriving is
    always read to its end, even if it is larger than ``READ_AHEAD``.
    """

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        self._flow_mutex = threading.Lock()
        self._pauses: set[str] = set()
        self._is_over = False
        self._whole = 0  # bytes of complete messages that were not taken yet
        self._arriving = 0  # bytes of the message that is arriving
        super().__init__(*arguments, **settings)
        self.recv_messages.pause = lambda: self._pause("frames")
        self.recv_messages.resume = lambda: self._resume("frames")

    @property
    def waiting_bytes(self) -> int:
        """Return the size in bytes of the complete messages that the caller has not read yet."""
        return self._whole

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
            if isinstance(self.connection_exc, ssl.SSLError):
                raise self.connection_exc from error
            if isinstance(error, InvalidStatus) and 300 <= error.response.status_code < 400:
                target = ", ".join(error.response.headers.get_all("Location"))
                raise Redirected(error.response.status_code, target) from error
            raise

    def process_event(self, event: Event) -> None:
        """Process a received frame, and pause reading if there are too many unread bytes."""
        super().process_event(event)
        if not isinstance(event, Frame) or event.opcode not in _DATA:
            return
        self._arriving += len(event.data)
        if event.fin:
            with self._flow_mutex:
                self._whole += self._arriving
                self._arriving = 0
                if self._whole > READ_AHEAD:
                    self._add_pause("bytes")

    def close(self, code: CloseCode | int = CloseCode.NORMAL_CLOSURE, reason: str = "") -> None:
        """Close the connection; skip the closing handshake if there is too much unread data."""
        if self._pauses:
            self.close_socket()
        else:
            super().close(code, reason)

    def close_socket(self) -> None:
        """Close the socket, and wake the thread that reads from it so that the thread can end."""
        with self._flow_mutex:
            self._is_over = True
            for reason in tuple(self._pauses):
                self._drop_pause(reason)
        super().close_socket()

    def take(self, size: int) -> None:
        """Record that the caller has read ``size`` bytes, and resume receiving if possible."""
        with self._flow_mutex:
            self._whole -= size
            if self._whole <= READ_AHEAD:
                self._drop_pause("bytes")

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
