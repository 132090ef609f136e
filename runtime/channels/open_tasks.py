"""A client's records of its newest tasks: the messages sent, and the number of replies received."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np

from splitonnx.errors import RemoteProtocolError
from splitonnx.messages import TaskKey, Tensors
from splitonnx.names import ACCUMULATE, SHARE, STEP_PHASES, TRAIN

Sent = tuple[Tensors, Mapping[str, np.ndarray]]
"""A message that was sent, and its tensors."""


@dataclass(kw_only=True)
class OpenTask:
    """A task in progress: how many messages were sent, and how many replies were received.

    ``due`` is the number of the reply that is expected next, counted from 0.  After a reconnect,
    every message is sent again, and ``due`` is reset to 0.  The server may then repeat its replies,
    in order and each at most once.
    """

    key: TaskKey
    sent: list[Sent] = field(default_factory=list)
    received: int = 0
    due: int = 0

    @property
    def micro_batch(self) -> int:
        """Return how many micro-batches of its step come before the task."""
        return self.key.micro_batch if self.key.phase in STEP_PHASES else 0

    def take(self, message: Tensors) -> bool:
        """Check that a message is the reply that is expected next, and count it.

        Return whether it has not been received before.

        Raises:
            RemoteProtocolError: the message belongs to another task or is out of order.
        """
        if message.key != self.key:
            raise RemoteProtocolError(f"it answered {message.key}, open is {self.key}")
        if message.turn != self.due:
            raise RemoteProtocolError(f"it sent message {message.turn} where {self.due} was due")
        self.due += 1
        is_new = message.turn == self.received
        self.received += is_new
        return is_new


class SentTasks:
    """A client's open tasks in the order of their beginnings, and its last task of a step.

    The last one is kept because the server may not have received all of its messages.  It is
    forgotten when a task is answered that began after it had ended.
    """

    def __init__(self) -> None:
        self._open: dict[TaskKey, OpenTask] = {}
        self._echoed: dict[TaskKey, OpenTask] = {}  # ended, while replies come once more
        self._sent: list[tuple[OpenTask, Sent]] = []  # by open tasks, in order
        self._done = 0  # micro-batches of the running step that have ended
        self._last: OpenTask | None = None
        self._beside: frozenset[TaskKey] = frozenset()  # tasks that were open when that one ended

    @property
    def count(self) -> int:
        """Return how many tasks are open."""
        return len(self._open)

    @property
    def micro_batch(self) -> int:
        """Return how many micro-batches of the running step come before the oldest open task.

        Between two tasks of a step, this is how many have ended.
        """
        return next((task.micro_batch for task in self._open.values()), self._done)

    def find_answered(self, message: Tensors) -> OpenTask:
        """Return the open task that a reply belongs to.

        It may also be one that ended after its messages were sent again, as its replies come again.

        Raises:
            RemoteProtocolError: that task is not open.
        """
        echoed = self._echoed.get(message.key)
        if echoed is not None and echoed.due < echoed.received:
            return echoed
        if message.key not in self._open:
            opened = ", ".join(map(str, self._open)) or "no task"
            raise RemoteProtocolError(f"it answered {message.key}, open is {opened}")
        return self._open[message.key]

    def record(
        self, key: TaskKey, wires: Mapping[str, np.ndarray], seed: int, learning_rate: float
    ) -> Tensors:
        """Make the next message of a task, and keep it, to be sent again if necessary.

        The first message opens the task.
        """
        task = self._open.setdefault(key, OpenTask(key=key))
        message = Tensors(
            session=key.session,
            phase=key.phase,
            step=key.step,
            micro_batch=key.micro_batch,
            turn=len(task.sent),
            seed=seed,
            learning_rate=learning_rate,
        )
        task.sent.append((message, wires))
        self._sent.append((task, (message, wires)))
        return message

    def end(self, key: TaskKey) -> None:
        """Close a task; do nothing if it is not open."""
        task = self._open.pop(key, None)
        self._sent = [(own, sent) for own, sent in self._sent if own is not task]
        if task is not None and key.phase in STEP_PHASES:
            self._last, self._beside = task, frozenset(self._open)
            self._done = key.micro_batch + 1 if key.phase == ACCUMULATE else 0
        if task is not None and task.due < task.received:
            self._echoed[key] = task

    def end_all(self) -> None:
        """Close all tasks, and give up the micro-batches of the running step."""
        for key in tuple(self._open):
            self.end(key)
        self._done = 0

    def note_reply(self, task: OpenTask) -> None:
        """Forget the last task if the server answered one that began after it had ended.

        After a share, it would not be enough to repeat the last step.
        """
        if task.key.phase in (*STEP_PHASES, SHARE) and task.key not in self._beside:
            self._last = None

    def begin_connection(self) -> None:
        """Record that a new connection was opened, on which no reply comes again so far."""
        self._echoed.clear()
        for task in self._open.values():
            task.due = task.received

    def repeat(self) -> Iterator[Sent]:
        """Yield the messages of open tasks in the order in which they were sent first.

        From now on, the server may answer each of these tasks again, from its first reply on.
        """
        for task in self._open.values():
            task.due = 0
        for _, sent in self._sent:
            yield sent

    def find_last(self, step: int) -> OpenTask | None:
        """Return the last task if it comes right before the next one of a client at ``step``.

        An update is not repeated, because the server confirmed it.
        """
        number = self.micro_batch
        before = (ACCUMULATE, step, number - 1) if number else (TRAIN, step - 1, 0)
        last = self._last
        if last is None or before != (last.key.phase, last.key.step, last.key.micro_batch):
            return None
        return last
