"""A connection whose messages tasks send: in order, all before it closes, and with errors."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

import pytest

from splitonnx.codecs import Chunk
from splitonnx.errors import ConnectionLost
from splitonnx.runtime.channels.asynchronous import queued_sending
from splitonnx.runtime.channels.asynchronous.queued_sending import MOST_WAITING, QueuedSending


class Connection:
    """A connection that sends a message only when it may, and remembers what it sent."""

    def __init__(self, breaks_at: int = -1) -> None:
        self.may_send = asyncio.Event()
        self.sent: list[bytes] = []
        self.ended = asyncio.Event()
        self.ends: list[str] = []
        self._breaks_at = breaks_at

    async def send(self, chunks: Sequence[Chunk]) -> None:
        await self.may_send.wait()
        if len(self.sent) == self._breaks_at:
            raise ConnectionLost("the server", "it broke while sending")
        self.sent.append(b"".join(chunks))

    async def receive(self) -> bytes:
        await self.ended.wait()
        raise ConnectionLost("the server", "it was closed")

    async def close(self) -> None:
        self.ends.append("close")
        self.ended.set()

    def abort(self) -> None:
        self.ends.append("abort")
        self.ended.set()


def run(play: Callable[[], Awaitable[None]]) -> None:
    async def main() -> None:
        await play()
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(main())


def test_the_caller_goes_on_while_messages_wait_and_all_are_sent_in_order() -> None:
    async def play() -> None:
        connection = Connection()
        sending = QueuedSending(connection)
        messages = [bytes([number]) * 3 for number in range(MOST_WAITING)]
        for message in messages:
            await sending.send([message[:1], message[1:]])
        assert connection.sent == []
        connection.may_send.set()
        await sending.close()
        assert connection.sent == messages
        assert connection.ends == ["close"]

    run(play)


def test_the_caller_waits_while_too_many_messages_wait() -> None:
    async def play() -> None:
        connection = Connection()
        sending = QueuedSending(connection)
        for _ in range(MOST_WAITING):
            await sending.send([b"a"])
        one_more = asyncio.create_task(sending.send([b"b"]))
        for _ in range(5):
            await asyncio.sleep(0)
        assert not one_more.done()
        connection.may_send.set()
        await one_more
        await sending.close()
        assert connection.sent == [b"a"] * MOST_WAITING + [b"b"]

    run(play)


def test_who_waits_for_a_reply_learns_why_a_message_could_not_be_sent() -> None:
    async def play() -> None:
        connection = Connection(breaks_at=1)
        connection.may_send.set()
        sending = QueuedSending(connection)
        for content in (b"a", b"b", b"never"):
            await sending.send([content])
        with pytest.raises(ConnectionLost, match="broke while sending"):
            await sending.receive()
        with pytest.raises(ConnectionLost, match="broke while sending"):
            await sending.send([b"c"])
        await sending.close()
        assert connection.sent == [b"a"]

    run(play)


def test_closing_gives_up_what_cannot_be_sent_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queued_sending, "CLOSE_SECONDS", 0.01)

    async def play() -> None:
        connection = Connection()
        sending = QueuedSending(connection)
        await sending.send([b"a"])
        await sending.close()
        assert (connection.sent, connection.ends) == ([], ["abort"])

    run(play)


def test_closing_that_is_cancelled_ends_the_connection_at_once() -> None:
    async def play() -> None:
        connection = Connection()
        sending = QueuedSending(connection)
        await sending.send([b"a"])
        closing = asyncio.create_task(sending.close())
        await asyncio.sleep(0)
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        await asyncio.sleep(0)  # the task that sends learns that it was cancelled
        assert (connection.sent, connection.ends) == ([], ["abort"])

    run(play)
