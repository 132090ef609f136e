"""The ledger of a session: the handled messages of its newest tasks, and the replies to them.

A step is one task, or the tasks of its micro-batches and then its update.  Each is performed
exactly once, even if its messages arrive several times: a repeated message is answered with the
recorded replies.  The ledger covers the running task and the last finished one, whose replies may
have been lost.  Earlier tasks need no records, because a client that begins a task has received all
replies of those before it.  The ledger only keeps records: it neither runs nor sends anything.
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
from splitonnx.messages import Hello, TaskKey, Tensors

Reply = list[Chunk]

KEPT_BYTES = 128 << 20
"""Bytes of handled messages that a server keeps, for all clients together, instead of hashing."""


class Verdict(Enum):
    """The decision on how to handle a message."""

    BEGIN = auto()  # first message of its task: abort what was begun of the task
    CONTINUE = auto()  # next message of the running task
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


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """Where client and server continue; see :class:`~splitonnx.messages.Welcome`."""

    step: int
    wants_repeat: bool = False
    restarts: bool = False


class Ledger:
    """The ledger of a session whose next training step is ``step``.

    ``micro_batch`` is the number of that step's micro-batches that were accumulated.
    """

    def __init__(self, step: int) -> None:
        self.step = step
        self.micro_batch = 0
        self._running: list[_Turn] = []
        self._made: list[_Turn] = []
        self._made_at = (-1, 0)

    @property
    def is_open(self) -> bool:
        """Return whether a step has begun but has not finished."""
        return bool(self._running or self.micro_batch)

    def welcome(self, hello: Hello, *, is_joint: bool) -> Continuation | None:
        """Return how a client can continue where it is, or ``None`` if it cannot.

        ``is_joint`` means that a step is made with other clients, so that it is not taken back.
        """
        step, number, can_repeat = hello.step, hello.micro_batch, hello.can_repeat
        is_open = hello.is_open or is_joint
        if not self.suits(step, is_open=is_open, can_repeat=can_repeat, micro_batch=number):
            return None
        return Continuation(step=step, wants_repeat=self.is_behind(step, number))

    def suits(
        self, step: int, *, is_open: bool, can_repeat: bool = False, micro_batch: int = 0
    ) -> bool:
        """Return whether a client that is at ``step`` can continue without going back.

        In general, client and server must be at the same task, with two exceptions.  ``is_open``
        means that the client is in the middle of a task and will send the task's messages again:
        then the server may be one task ahead, if it still has its replies to that task.
        ``can_repeat`` means that the client can also send the messages of the task before it again:
        then the server may be one task behind.  ``micro_batch`` is the client's, as that of the
        ledger is the server's.
        """
        place = (step, micro_batch)
        if place == (self.step, self.micro_batch):
            return True
        if place == self._made_at and self._made:
            return is_open
        return can_repeat and self.is_behind(step, micro_batch)

    def is_behind(self, step: int, micro_batch: int) -> bool:
        """Return whether the server's next task is the one before the client's next."""
        before = (step, micro_batch - 1) if micro_batch else (step - 1, 0)
        return before == (self.step, self.micro_batch)

    def classify(
        self, step: int, turn: int, fingerprint: Fingerprint, micro_batch: int = 0
    ) -> Verdict:
        """Decide how to handle message number ``turn`` of a task, without changing the ledger.

        Raises:
            RemoteProtocolError: the message belongs to another task, or an earlier message is
                missing.
            StepConflict: a message with this number but different contents has already been
                handled.
        """
        if (step, micro_batch) == self._made_at and self._made:
            self._compare(self._made, step, turn, fingerprint)
            return Verdict.REPEAT
        if step != self.step:
            raise RemoteProtocolError(f"it is at step {step}, the server at {self.step}")
        if micro_batch != self.micro_batch and (micro_batch or turn):
            raise RemoteProtocolError(
                f"it is at micro-batch {micro_batch} of step {step}, the server at "
                f"{self.micro_batch}"
            )
        if micro_batch != self.micro_batch:
            return Verdict.BEGIN  # the whole step begins again
        if turn == 0 and not (self._running and _are_same(self._running[0], fingerprint)):
            if self._running and micro_batch:
                raise StepConflict(step)  # gradients were added up since the step began
            return Verdict.BEGIN
        if turn == len(self._running):
            return Verdict.CONTINUE
        self._compare(self._running, step, turn, fingerprint)
        return Verdict.REPEAT

    def begin(self, fingerprint: Fingerprint) -> None:
        """Record the first message of the next task, before it is handled."""
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

    def repeat(self, step: int, turn: int, micro_batch: int = 0) -> Iterator[Reply]:
        """Yield the recorded replies to a message that :meth:`classify` marked as ``REPEAT``."""
        is_made = (step, micro_batch) == self._made_at and bool(self._made)
        turns = self._made if is_made else self._running
        yield from turns[turn].replies

    def commit(self, *, ends_step: bool = True) -> None:
        """Mark the running task as finished, and its step if the task ends it."""
        self._made, self._running = self._running, []
        self._made_at = (self.step, self.micro_batch)
        if ends_step:
            self.step, self.micro_batch = self.step + 1, 0
        else:
            self.micro_batch += 1

    def abandon(self) -> None:
        """Forget the running step with all its micro-batches, as if it had never begun."""
        self._running = []
        if self.micro_batch:
            self.micro_batch, self._made = 0, []

    def _compare(self, turns: list[_Turn], step: int, turn: int, fingerprint: Fingerprint) -> None:
        if turn >= len(turns):
            raise RemoteProtocolError(
                f"it sent message {turn} of step {step}, but the step has only {len(turns)}"
            )
        if not _are_same(turns[turn], fingerprint):
            raise StepConflict(step)


def _are_same(turn: _Turn, fingerprint: Fingerprint) -> bool:
    return turn.fingerprint.take() == fingerprint.take()
