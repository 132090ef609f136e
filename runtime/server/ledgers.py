"""The ledger of a session: the handled messages of its newest steps, and the replies to them.

Each step is performed exactly once, even if its messages arrive several times: a repeated message
is answered with the recorded replies.  The ledger covers the running step and the last finished
step, whose replies may have been lost.  Earlier steps need no records, because a client that begins
a step has received all replies of the steps before it.  The ledger only keeps records: it neither
runs nor sends anything.
"""

from __future__ import annotations

import hashlib
import threading
import weakref
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum, auto

from splitonnx.codecs import Chunk
from splitonnx.errors import RemoteProtocolError, StepConflict
from splitonnx.messages import TaskKey, Tensors

Reply = list[Chunk]

KEPT_BYTES = 128 << 20
"""Bytes of handled messages that a server keeps, for all clients together, instead of hashing."""


class Verdict(Enum):
    """The decision on how to handle a message."""

    BEGIN = auto()  # first message of its step: abort what was begun of the step
    CONTINUE = auto()  # next message of the running step
    REPEAT = auto()  # message was handled before: send the same replies again


class Fingerprint:
    """The SHA-256 hash of a message's bytes, computed when it is first needed.

    It is needed if a message with the same number arrives, which is rare, and computing it takes as
    long as receiving the bytes.  The bytes are kept until the hash has been computed.  ``contents``
    limits how many are kept; without it, :meth:`settle` computes the hash at once.
    """

    def __init__(self, content: Chunk | bytearray, contents: KeptContents | None = None) -> None:
        self.size = len(content)
        self._content: Chunk | bytearray | None = content
        self._contents = contents
        self._digest = b""

    def take(self) -> bytes:
        """Return the hash and release the bytes; the first call computes the hash."""
        content = self._content  # two threads may compute it, and get the same
        if content is not None:
            self._digest = hashlib.sha256(content).digest()
            self._content = None
        return self._digest

    def settle(self) -> None:
        """Keep the bytes if there is room for them, and compute the hash otherwise."""
        if self._contents is None or self._content is None:
            self.take()
        else:
            self._contents.add(self)


class KeptContents:
    """A limit on the bytes of handled messages that are kept because they were not hashed yet.

    ``most`` is the largest number of bytes.  Above it, the oldest messages are hashed.  Messages
    may be added in any thread, and leave when they are hashed or when their ledger forgets them.
    """

    def __init__(self, most: int = KEPT_BYTES) -> None:
        self.size = 0
        self._most = most
        self._sizes: dict[weakref.ref[Fingerprint], int] = {}  # the oldest first
        self._mutex = threading.RLock()  # a fingerprint may go while this thread holds it

    def add(self, fingerprint: Fingerprint) -> None:
        """Count a message's bytes, and compute the hashes of the oldest messages if necessary."""
        due: list[Fingerprint | None] = []
        with self._mutex:
            self._sizes[weakref.ref(fingerprint, self._forget)] = fingerprint.size
            self.size += fingerprint.size
            while self.size > self._most:
                oldest = next(iter(self._sizes))
                due.append(oldest())
                self._forget(oldest)
        for found in due:
            if found is not None:
                found.take()

    def _forget(self, reference: weakref.ref[Fingerprint]) -> None:
        with self._mutex:
            self.size -= self._sizes.pop(reference, 0)


@dataclass(kw_only=True)
class Query:
    """A task that changes no step: its first message, and how many were handled and answered."""

    message: Tensors
    turns: int = 0
    replies: int = 0

    @property
    def key(self) -> TaskKey:
        """Return the key of the task."""
        return self.message.key


@dataclass(kw_only=True)
class _Turn:
    fingerprint: Fingerprint
    replies: list[Reply] = field(default_factory=list)


class Ledger:
    """The ledger of a session whose next training step is ``step``."""

    def __init__(self, step: int) -> None:
        self.step = step
        self._running: list[_Turn] = []
        self._made: list[_Turn] = []

    @property
    def is_open(self) -> bool:
        """Return whether a step has begun but has not finished."""
        return bool(self._running)

    def suits(self, step: int, *, is_open: bool, can_repeat: bool = False) -> bool:
        """Return whether a client that is at ``step`` can continue without going back.

        In general, client and server must be at the same step, with two exceptions.  ``is_open``
        means that the client is in the middle of ``step`` and will send the step's messages again:
        then the server may be one step ahead, if it still has its replies to that step.
        ``can_repeat`` means that the client can also send the messages of the step before ``step``
        again: then the server may be one step behind.
        """
        if step == self.step - 1:
            return is_open and bool(self._made)
        return step == self.step or (can_repeat and step == self.step + 1)

    def classify(self, step: int, turn: int, fingerprint: Fingerprint) -> Verdict:
        """Decide how to handle message number ``turn`` of a step, without changing the ledger.

        Raises:
            RemoteProtocolError: the message belongs to another step, or an earlier message is
                missing.
            StepConflict: a message with this number but different contents has already been
                handled.
        """
        if step == self.step - 1 and self._made:
            self._compare(self._made, step, turn, fingerprint)
            return Verdict.REPEAT
        if step != self.step:
            raise RemoteProtocolError(f"it is at step {step}, the server at {self.step}")
        if turn == 0 and not (self._running and _are_same(self._running[0], fingerprint)):
            return Verdict.BEGIN
        if turn == len(self._running):
            return Verdict.CONTINUE
        self._compare(self._running, step, turn, fingerprint)
        return Verdict.REPEAT

    def begin(self, fingerprint: Fingerprint) -> None:
        """Record the first message of the next step, before it is handled."""
        self._made = []
        self._running = [_Turn(fingerprint=fingerprint)]

    def continue_step(self, fingerprint: Fingerprint) -> None:
        """Record the next message of the running step, before it is handled."""
        self._running.append(_Turn(fingerprint=fingerprint))

    @property
    def turns(self) -> int:
        """Return how many messages of the running step were recorded."""
        return len(self._running)

    def answer(self, reply: Iterable[Chunk], turn: int) -> Reply:
        """Record one more reply to a message, and return the reply as a list of chunks."""
        kept = list(reply)
        self._running[turn].replies.append(kept)
        return kept

    def count_replies(self) -> int:
        """Return how many replies the running step has so far."""
        return sum(len(turn.replies) for turn in self._running)

    def repeat(self, step: int, turn: int) -> Iterator[Reply]:
        """Yield the recorded replies to a message that :meth:`classify` marked as ``REPEAT``."""
        turns = self._running if step == self.step else self._made
        yield from turns[turn].replies

    def commit(self) -> None:
        """Mark the running step as finished."""
        self.step += 1
        self._made, self._running = self._running, []

    def abandon(self) -> None:
        """Forget the running step, as if it had never begun."""
        self._running = []

    def _compare(self, turns: list[_Turn], step: int, turn: int, fingerprint: Fingerprint) -> None:
        if turn >= len(turns):
            raise RemoteProtocolError(
                f"it sent message {turn} of step {step}, but the step has only {len(turns)}"
            )
        if not _are_same(turns[turn], fingerprint):
            raise StepConflict(step)


def _are_same(turn: _Turn, fingerprint: Fingerprint) -> bool:
    return turn.fingerprint.take() == fingerprint.take()
