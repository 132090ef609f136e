"""A connection whose messages a thread sends: in order, all before it closes, and with errors."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import pytest

from splitonnx.codecs import Chunk
from splitonnx.errors import ConnectionLost
from splitonnx.runtime.channels.background_sending import MOST_WAITING, BackgroundSending

WAIT = 30.0


class Connection:
    """A connection that sends a message only when it may, and remembers what it sent."""

    def __init__(self) -> None:
        self.bytes_sent = self.bytes_received = 0
        self.may_send = threading.Event()
        self.sent: list[bytes] = []
        self.is_closed = threading.Event()
        self.breaks_at = -1

    def send(self, chunks: Sequence[Chunk]) -> None:
        assert self.may_send.wait(WAIT)
        if len(self.sent) == self.breaks_at:
            raise ConnectionLost("the server", "it broke while sending")
        self.sent.append(b"".join(chunks))
        self.bytes_sent += len(self.sent[-1])

    def receive(self) -> bytes:
        assert self.is_closed.wait(WAIT)
        raise ConnectionLost("the server", "it was closed")

    def close(self) -> None:
        self.is_closed.set()


def test_the_caller_goes_on_while_messages_wait_and_all_are_sent_in_order() -> None:
    connection = Connection()
    sending = BackgroundSending(connection)
    messages = [bytes([number]) * 3 for number in range(MOST_WAITING)]
    for message in messages:
        sending.send([message[:1], message[1:]])
    assert connection.sent == []
    connection.may_send.set()
    sending.close()
    assert connection.sent == messages
    assert connection.is_closed.is_set()
    assert sending.bytes_sent == 3 * MOST_WAITING


def test_who_waits_for_a_reply_learns_why_a_message_could_not_be_sent() -> None:
    connection = Connection()
    connection.breaks_at = 1
    connection.may_send.set()
    sending = BackgroundSending(connection)
    sending.send([b"a"])
    sending.send([b"b"])
    with pytest.raises(ConnectionLost, match="broke while sending"):
        sending.receive()
    with pytest.raises(ConnectionLost, match="broke while sending"):
        sending.send([b"c"])
    sending.close()
    assert connection.sent == [b"a"]
