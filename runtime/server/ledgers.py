"""The ledger of a session: the handled messages of its newest tasks, and the replies to them.

A step is one task, or the tasks of its micro-batches and then its update.  Each is performed
exactly once, even if its messages arrive several times: a repeated message is answered with the
recorded replies.  A client may have several tasks of one step open at once, which make up its
*window*.  The ledger covers as many tasks as the window has, the newest ones, whose replies may
have been lost.  Earlier tasks need no records, because a client that begins a task has received all
replies of those before its window.  The ledger only keeps records: it neither runs nor sends
anything.
"""

from __future__ import annotations

import hashlib
import threading
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto

from splitonnx.codecs import Chunk
from splitonnx.errors import RemoteProtocolError, StepConflict
from splitonnx.messages import Hello, Message, TaskKey, Tensors
from splitonnx.names import STEP_PHASES

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
class OpenTask:
    """An unfinished task of a step, and the message that began it.

    ``answered`` is how many of its messages were handled whole, and ``heard`` is how many came on
    the newest connection; the replies to others wait until they come again.
    """

    message: Tensors
    answered: int = 0
    heard: int = 1


@dataclass(kw_only=True)
class _Turn:
    fingerprint: Fingerprint
    replies: list[Reply] = field(default_factory=list)


@dataclass(kw_only=True)
class _Task:
    """The records of a task; ``ends_step`` means that its end is the end of its step."""

    ends_step: bool
    turns: list[_Turn]
    is_finished: bool = False


@dataclass(frozen=True, kw_only=True)
class Continuation:
    """Where client and server continue; see :class:`~splitonnx.messages.Welcome`."""

    step: int
    wants_repeat: bool = False
    restarts: bool = False


class Ledger:
    """The ledger of a session whose next training step is ``step``.

    ``micro_batch`` is the number of that step's micro-batches that were accumulated.  ``in_flight``
    is the number of tasks that a client may have open at once.  A task is named by its step and its
    number in the step.  ``is_joint`` means that a step is made with other clients, so that it is
    not taken back: then all tasks of the newest step are kept.
    """

    def __init__(self, step: int, in_flight: int = 1, *, is_joint: bool = False) -> None:
        self.step = step
        self.micro_batch = 0
        self.in_flight = in_flight
        self.is_joint = is_joint
        self._tasks: dict[tuple[int, int], _Task] = {}  # the newest, in the order of their numbers

    @property
    def is_open(self) -> bool:
        """Return whether a step has begun but has not finished."""
        return bool(self.micro_batch or self._list_open())

    @property
    def kept_bytes(self) -> int:
        """Return the size of the replies that are kept of finished tasks."""
        turns = [turn for task in self._tasks.values() if task.is_finished for turn in task.turns]
        return sum(len(chunk) for turn in turns for reply in turn.replies for chunk in reply)

    def welcome(self, hello: Hello) -> Continuation | None:
        """Return how a client can continue where it is, or ``None`` if it cannot."""
        step, number, can_repeat = hello.step, hello.micro_batch, hello.can_repeat
        is_open = hello.is_open or (self.is_joint and step < self.step)
        if not self.suits(step, is_open=is_open, can_repeat=can_repeat, micro_batch=number):
            return None
        return Continuation(step=step, wants_repeat=self.is_behind(step, number))

    def suits(
        self, step: int, *, is_open: bool, can_repeat: bool = False, micro_batch: int = 0
    ) -> bool:
        """Return whether a client that is at ``step`` can continue without going back.

        In general, client and server must be at the same task, with two exceptions.  ``is_open``
        means that the client is in the middle of a task and will send the messages of all its open
        tasks again: then the server may be ahead, as far as it still has its replies to those
        tasks.  ``can_repeat`` means that the client can also send the messages of the task before
        it again: then the server may be one task behind.  ``micro_batch`` is the client's, as that
        of the ledger is the server's.
        """
        place = (step, micro_batch)
        if place == (self.step, self.micro_batch):
            return True
        if place in self._tasks and self._tasks[place].is_finished:
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
            RemoteProtocolError: the message belongs to another task, an earlier message is missing,
                or too many tasks would be open.
            StepConflict: a message with this number but different contents has already been
                handled.
        """
        task = self._tasks.get((step, micro_batch))
        if task is not None and task.is_finished:
            _compare(task.turns, step, turn, fingerprint)
            return Verdict.REPEAT
        if step != self.step:
            raise RemoteProtocolError(f"it is at step {step}, the server at {self.step}")
        if task is None:
            if turn or micro_batch:  # otherwise the whole step begins, perhaps again
                self._check_next(step, turn, micro_batch)
            return Verdict.BEGIN
        if turn == 0 and not _are_same(task.turns[0], fingerprint):
            if micro_batch:
                raise StepConflict(step)  # gradients were added up since the step began
            return Verdict.BEGIN
        if turn == len(task.turns):
            return Verdict.CONTINUE
        _compare(task.turns, step, turn, fingerprint)
        return Verdict.REPEAT

    def begin(self, fingerprint: Fingerprint, *, ends_step: bool = True) -> None:
        """Record the first message of the next task, before it is handled.

        ``ends_step`` means that the end of the task is that of its step.
        """
        place = (self.step, self.micro_batch + len(self._list_open()))
        if place[1] == 0:
            self._tasks = {}  # a client that begins a step has all replies of the one before
        while len(self._tasks) >= self.in_flight and not self.is_joint:
            del self._tasks[next(iter(self._tasks))]
        self._tasks[place] = _Task(ends_step=ends_step, turns=[_Turn(fingerprint=fingerprint)])

    def continue_task(self, fingerprint: Fingerprint, step: int, micro_batch: int = 0) -> None:
        """Record the next message of an open task, before it is handled."""
        self._tasks[step, micro_batch].turns.append(_Turn(fingerprint=fingerprint))

    def count_turns(self, step: int, micro_batch: int = 0) -> int:
        """Return how many messages of an unfinished task were recorded."""
        task = self._tasks.get((step, micro_batch))
        return 0 if task is None or task.is_finished else len(task.turns)

    def answer(self, reply: Iterable[Chunk], turn: int, step: int, micro_batch: int = 0) -> Reply:
        """Record one more reply to a message, and return the reply as a list of chunks."""
        kept = list(reply)
        self._tasks[step, micro_batch].turns[turn].replies.append(kept)
        return kept

    def count_replies(self, step: int, micro_batch: int = 0) -> int:
        """Return how many replies a task has so far."""
        return sum(len(turn.replies) for turn in self._tasks[step, micro_batch].turns)

    def repeat(self, step: int, turn: int, micro_batch: int = 0) -> Iterator[Reply]:
        """Yield the recorded replies to a message that :meth:`classify` marked as ``REPEAT``."""
        yield from self._tasks[step, micro_batch].turns[turn].replies

    def commit(self) -> None:
        """Mark the oldest unfinished task as finished, and its step if the task ends it."""
        task = self._list_open()[0]
        task.is_finished = True
        if task.ends_step:
            self.step, self.micro_batch = self.step + 1, 0
        else:
            self.micro_batch += 1

    def abandon(self) -> None:
        """Forget the running step with all its micro-batches, as if it had never begun."""
        self._tasks = {place: task for place, task in self._tasks.items() if place[0] != self.step}
        self.micro_batch = 0

    def _check_next(self, step: int, turn: int, micro_batch: int) -> None:
        """Check that a task that has no records is the next, and may be begun by its message."""
        if turn:
            name = (
                f"step {step}" if not micro_batch else f"micro-batch {micro_batch} of step {step}"
            )
            raise RemoteProtocolError(f"it sent message {turn} of {name}, which has not begun")
        tasks = self._list_open()
        if micro_batch != self.micro_batch + len(tasks) or (tasks and tasks[-1].ends_step):
            raise RemoteProtocolError(
                f"it is at micro-batch {micro_batch} of step {step}, the server at "
                f"{self.micro_batch + len(tasks)}"
            )
        if len(tasks) >= self.in_flight:
            raise RemoteProtocolError(
                f"it begins micro-batch {micro_batch} of step {step} before {self.micro_batch} has "
                f"ended, and may have {self.in_flight} open"
            )

    def _list_open(self) -> list[_Task]:
        return [task for task in self._tasks.values() if not task.is_finished]


def _compare(turns: list[_Turn], step: int, turn: int, fingerprint: Fingerprint) -> None:
    if turn >= len(turns):
        raise RemoteProtocolError(
            f"it sent message {turn} of step {step}, but the step has only {len(turns)}"
        )
    if not _are_same(turns[turn], fingerprint):
        raise StepConflict(step)


def _are_same(turn: _Turn, fingerprint: Fingerprint) -> bool:
    return turn.fingerprint.take() == fingerprint.take()


def list_finished(message: Message, before: Sequence[TaskKey], number: int) -> tuple[str, ...]:
    """Return the phases of the ``number`` tasks that a message finished.

    ``before`` are the tasks of the step that were open before the message.  A message may finish
    the tasks after its own, too, if they waited for it.
    """
    if not isinstance(message, Tensors):
        return ()
    if message.phase not in STEP_PHASES:
        return (message.phase,) * number
    keys = dict.fromkeys((*before, message.key))  # in the order in which they end
    return tuple(key.phase for key in keys)[:number]
