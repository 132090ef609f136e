"""Replies that leave while the next ones are worked on."""

from __future__ import annotations

import asyncio

import pytest

from splitonnx.errors import ConnectionLost
from splitonnx.messages import Tensors
from splitonnx.runtime.server.ledgers import Reply
from splitonnx.runtime.server.reply_senders import ReplySender


class Reader:
    """Takes one reply each time it is let."""

    def __init__(self, *, gone_after: int = 100) -> None:
        self.taken: list[Reply] = []
        self.may_take = asyncio.Semaphore(0)
        self._gone_after = gone_after

    async def send(self, reply: Reply) -> None:
        await self.may_take.acquire()
        if len(self.taken) == self._gone_after:
            raise ConnectionLost("reader", "it left")
        self.taken.append(reply)


async def settle() -> None:
    for _ in range(10):
        await asyncio.sleep(0)


def test_replies_leave_in_their_order_and_each_once_the_one_before_is_taken() -> None:
    async def run() -> None:
        reader = Reader()
        sender = ReplySender(reader.send)
        await sender.wait()  # there is nothing to send
        sender.put([b"first"])
        sender.put([b"second"])
        await settle()
        assert reader.taken == []
        reader.may_take.release()
        await settle()
        assert reader.taken == [[b"first"]]
        assert sender.unsent == 1
        reader.may_take.release()
        await sender.wait()
        sender.put([b"third"])  # after all were sent
        reader.may_take.release()
        await sender.wait()
        assert reader.taken == [[b"first"], [b"second"], [b"third"]]

    asyncio.run(run())


def test_after_a_reply_that_cannot_be_sent_none_is_tried_and_the_error_is_kept() -> None:
    async def run() -> None:
        reader = Reader(gone_after=1)
        sender = ReplySender(reader.send)
        for content in (b"first", b"second", b"third"):
            sender.put([content])
            reader.may_take.release()
        await settle()
        sender.put([b"fourth"])
        reader.may_take.release()
        await settle()
        assert reader.taken == [[b"first"]]
        with pytest.raises(ConnectionLost):
            await sender.wait()

    asyncio.run(run())


def test_what_comes_after_the_end_is_not_sent() -> None:
    async def run() -> None:
        reader = Reader()
        sender = ReplySender(reader.send)
        sender.put([b"first"])
        reader.may_take.release()
        await sender.wait()
        sender.cancel()
        sender.put([b"late"])  # a thread went on to its end
        reader.may_take.release()
        await settle()
        assert reader.taken == [[b"first"]]

    asyncio.run(run())


def test_who_may_leave_some_tasks_unread_waits_for_the_others_alone() -> None:
    async def run() -> None:
        reader = Reader()
        sender = ReplySender(reader.send)
        for content in (b"first", b"first again", b"second", b"third"):
            sender.put([content], content[:5])
        await sender.wait(3)
        waiting = asyncio.create_task(sender.wait(1))
        reader.may_take.release()
        await settle()
        assert (sender.unsent, waiting.done()) == (3, False)
        reader.may_take.release()
        await settle()
        assert (sender.unsent, waiting.done()) == (2, False)
        reader.may_take.release()
        await settle()
        assert (sender.unsent, waiting.done()) == (1, True)

    asyncio.run(run())


def make_message(step: int, turn: int) -> Tensors:
    return Tensors(
        session="5" * 32,
        phase="accumulate",
        step=0,
        micro_batch=step,
        turn=turn,
        seed=0,
        learning_rate=0.1,
    )


@pytest.mark.parametrize(
    ("turns", "count"),
    [
        (((0, 0), (1, 0), (0, 1), (1, 1), (0, 2)), 2),  # two tasks, each as far as it is
        (((0, 0), (0, 0), (0, 0)), 3),  # one that begins again
        (((0, 0), (0, 1), (0, 1), (0, 1)), 3),  # a message that comes again
        (((0, 0), (0, 1), (0, 0), (0, 1)), 2),  # one that begins again and goes on
    ],
)
def test_a_task_counts_once_unless_it_begins_again_or_repeats_itself(
    turns: tuple[tuple[int, int], ...], count: int
) -> None:
    """A client that reads nothing would otherwise make any number of replies wait."""

    async def run() -> None:
        sender = ReplySender(Reader().send)
        for task, turn in turns:
            group = sender.find_group(make_message(task, turn))
            for reply in (b"first", b"second"):
                sender.put([reply], group)
        assert sender.unsent == count
        sender.put([b"of no task"])
        sender.put([b"of no task"])
        assert sender.unsent == count + 2
        sender.cancel()

    asyncio.run(run())


def test_who_waits_is_told_that_a_reply_cannot_be_sent() -> None:
    async def run() -> None:
        reader = Reader(gone_after=0)
        sender = ReplySender(reader.send)
        sender.put([b"first"])
        waiting = asyncio.create_task(sender.wait())
        await settle()
        reader.may_take.release()
        with pytest.raises(ConnectionLost):
            await waiting

    asyncio.run(run())
