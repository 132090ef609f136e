"""Send and receive the large payloads of websocket frames without copying them between buffers.

The websockets library collects all received bytes in one buffer, and cuts each frame's payload out
of it when the payload is complete.  :class:`PayloadReader` takes the place of that buffer: the
bytes of a large payload go at once to where they stay.  The library still reads and checks every
frame, except that :class:`UnmaskingReader` reads those of large masked payloads, which the library
would copy.  :func:`write_fragment` leaves header and payload apart, which the library would join.
"""

from __future__ import annotations

import secrets
import struct
from collections.abc import Callable, Generator, Sequence
from typing import TYPE_CHECKING, cast

import numpy as np
from websockets.exceptions import InvalidState
from websockets.frames import Frame, Opcode
from websockets.protocol import OPEN, Protocol, Side
from websockets.streams import StreamReader

from splitonnx.runtime.wire.fragments import FRAGMENT
from splitonnx.runtime.wire.masks import unmask

if TYPE_CHECKING:  # a client that waits needs no event loop
    from websockets.asyncio.connection import Connection

try:
    from websockets.speedups import apply_mask
except ImportError:  # where the library has no wheel
    from websockets.utils import apply_mask

DATA_FRAMES = frozenset({Opcode.TEXT, Opcode.BINARY, Opcode.CONT})
"""The opcodes of frames that carry messages; all others control the connection."""

_SMALLEST, _LARGEST = 1 << 14, 4 * FRAGMENT
"""Sizes in bytes of the payloads that get memory of their own before they have arrived.

Nobody can make this side reserve more than the largest by announcing a frame.
"""

_LONGEST = b"\xff"
"""Second byte of a masked frame whose size takes eight bytes."""
_MASKED = struct.Struct("!BBQ4s")
"""The header of such a frame: flags and opcode, the second byte, size and key."""

Place = Callable[[int, int], memoryview | None]


class PayloadReader(StreamReader):
    """A buffer of received bytes, from which a protocol reads.

    ``place`` returns the memory for a payload of the given size, or ``None`` if it has no place.
    Its second argument is the size of the message's payloads that were read, but not processed.
    """

    def __init__(self, protocol: Protocol, place: Place) -> None:
        super().__init__()
        self._protocol = protocol
        self._place = place
        self._gap: memoryview | None = None  # the part of a payload that has not arrived yet

    @property
    def gap(self) -> memoryview | None:
        """Return the memory for the rest of a payload; ``None`` or empty if none is read now.

        Bytes may be received there.  Call :meth:`fill` for them instead of :meth:`feed_data`.
        """
        return self._gap

    def fill(self, size: int) -> None:
        """Record that ``size`` bytes were received into :attr:`gap`."""
        assert self._gap is not None
        self._gap = self._gap[size:]

    @property
    def is_underway(self) -> bool:
        """Return whether part of a frame has arrived."""
        return self._gap is not None or bool(self.buffer)

    def read_exact(self, n: int) -> Generator[None, None, bytearray]:
        """Read ``n`` bytes; for a large payload, return a view of the memory that it has."""
        if not _SMALLEST <= n <= _LARGEST:
            return (yield from super().read_exact(n))
        return cast("bytearray", (yield from self._read_payload(n)))  # a frame takes any of these

    def _read_payload(self, n: int) -> Generator[None, None, memoryview]:
        waiting = measure_waiting(self._protocol)
        place = None if waiting is None else self._place(n, waiting)
        if place is None:
            place = np.empty(n, np.uint8).data
        there = min(n, len(self.buffer))
        place[:there] = self.buffer[:there]
        del self.buffer[:there]
        self._gap = place[there:]
        while self._gap:
            if self.eof:
                raise EOFError(f"stream ends {len(self._gap)} bytes before the end of a frame")
            yield
        self._gap = None
        return place

    def feed_data(self, data: bytes | bytearray) -> None:
        """Add received bytes, as far as possible to the payload that is being received."""
        if not self._gap:
            super().feed_data(data)
            return
        size = min(len(self._gap), len(data))
        view = memoryview(data)
        self._gap[:size] = view[:size]
        self._gap = self._gap[size:]
        self.buffer += view[size:]


class UnmaskingReader(PayloadReader):
    """A buffer of bytes that a server received, in which large payloads lose their masks.

    Frames with such payloads do not reach the library's parser: they are read here, before the
    parser begins with a frame, and then handed to what the parser hands its frames to.  Whatever
    is not as it should be is left to the parser, which knows what to do.
    """

    def at_eof(self) -> Generator[None, None, bool]:
        """Return whether all was read, once there is something or the end; first read frames.

        The parser calls this before each frame.
        """
        while not (yield from super().at_eof()):
            if self._protocol.eof_sent or not (yield from self._has_header()):
                return False
            first, _, size, key = _MASKED.unpack_from(self.buffer)
            if not _SMALLEST <= size <= min(_LARGEST, self._count_allowed()):
                return False
            del self.buffer[: _MASKED.size]
            payload = yield from self._read_payload(size)
            unmask(payload, key)
            frame = Frame(Opcode(first & 0xF), cast("bytes", payload), bool(first & 0x80))
            self._protocol.recv_frame(frame)
        return True

    def _has_header(self) -> Generator[None, None, bool]:
        """Wait for the whole header of a masked frame of bytes with the longest kind of size.

        Return whether it is one.
        """
        while len(self.buffer) < _MASKED.size:
            if self.eof or not _may_begin(self.buffer):
                return False
            yield
        return _may_begin(self.buffer)

    def _count_allowed(self) -> int:
        """Return how many bytes the next frame may have."""
        most = self._protocol.max_message_size
        return _LARGEST if most is None else most - (self._protocol.current_size or 0)


def _may_begin(buffer: bytearray) -> bool:
    """Return whether a masked binary frame may begin so, whose size takes eight bytes."""
    return buffer[0] & 0x7F in (Opcode.CONT, Opcode.BINARY) and buffer[1:2] in (b"", _LONGEST)


def read_payloads(protocol: Protocol, place: Place) -> PayloadReader:
    """Make a protocol that has received nothing yet read from a :class:`PayloadReader`."""
    is_masked = protocol.side is Side.SERVER
    reader = (UnmaskingReader if is_masked else PayloadReader)(protocol, place)
    protocol.reader = reader
    protocol.parser = protocol.parse()  # which holds the reader that it began with
    next(protocol.parser)
    return reader


def measure_waiting(protocol: Protocol) -> int | None:
    """Return how many bytes of a message were read that are not processed yet.

    The result is ``None`` if they end their message.
    """
    size = 0
    for event in protocol.events:
        if isinstance(event, Frame) and event.opcode in DATA_FRAMES:
            if event.fin:
                return None
            size += len(event.data)
    return size


def write_fragment(
    protocol: Protocol, payload: memoryview, *, is_first: bool, is_last: bool
) -> None:
    """Make a protocol send one fragment of a message, as its own methods do.

    What a client sends is masked (RFC 6455, section 5.3), each frame with a key of its own.  A
    server's payload is not copied: do not change it until it has been sent.

    Raises:
        InvalidState: the connection is not open.
    """
    if protocol.state is not OPEN:
        raise InvalidState(f"connection is {protocol.state.name.lower()}")
    protocol.expect_continuation_frame = not is_last
    head = (0x80 if is_last else 0) | (Opcode.BINARY if is_first else Opcode.CONT)
    is_masked = protocol.side is Side.CLIENT
    mask, size = (0x80 if is_masked else 0), len(payload)
    if size < 126:
        header = struct.pack("!BB", head, mask | size)
    elif size < 1 << 16:
        header = struct.pack("!BBH", head, mask | 126, size)
    else:
        header = struct.pack("!BBQ", head, mask | 127, size)
    data: bytes = cast("bytes", payload)  # which the connections take as well
    if is_masked:
        key = secrets.token_bytes(4)
        header, data = header + key, apply_mask(payload, key)
    protocol.writes += [header, data]


async def write_fragments(connection: Connection, fragments: Sequence[memoryview]) -> None:
    """Send a message in fragments on a connection of an event loop, on which no other is sent.

    If this is cancelled, the connection is of no more use.

    Raises:
        ConnectionClosed: the connection has ended.
    """
    sending = connection.send_in_progress = connection.loop.create_future()
    last = len(fragments) - 1
    try:
        for number, fragment in enumerate(fragments):
            async with connection.send_context():
                write_fragment(
                    connection.protocol, fragment, is_first=number == 0, is_last=number == last
                )
    finally:
        sending.set_result(None)
        connection.send_in_progress = None
