"""A client's records of its newest tasks: the messages sent, and the number of replies received."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from splitonnx.errors import LocalProtocolError, RemoteProtocolError
from splitonnx.messages import TaskKey, Tensors
from splitonnx.names import ACCUMULATE, SHARE, STEP_PHASES, TRAIN


@dataclass(kw_only=True)
class OpenTask:
    """A task in progress: the messages sent, and the number of replies received.

    ``due`` is the number of the reply that is expected next, counted from 0.  After a reconnect,
    every message is sent again, and ``due`` is reset to 0.  The server may then repeat its replies,
    in order and each at most once.
    """

    key: TaskKey
    sent: list[tuple[Tensors, Mapping[str, np.ndarray]]] = field(default_factory=list)
    received: int = 0
    due: int = 0

    @property
    def micro_batch(self) -> int:
        """Return how many micro-batches of its step come before the task."""
        return self.key.micro_batch if self.key.phase in STEP_PHASES else 0

    def check(self, message: Tensors) -> None:
        """Check that a message is the reply that is expected next, and count it.

        Raises:
            RemoteProtocolError: the message belongs to another task or is out of order.
        """
        if message.key != self.key:
            raise RemoteProtocolError(f"it answered {message.key}, open is {self.key}")
        if message.turn != self.due:
            raise RemoteProtocolError(f"it sent message {message.turn} where {self.due} was due")
        self.due += 1


class SentTasks:
    """A client's open task, and its last task of a step.

    The last one is kept because the server may not have received all of its messages.  It is
    ``None`` from the first reply to a later task on.
    """

    def __init__(self) -> None:
        self.open: OpenTask | None = None
        self._last: OpenTask | None = None

    @property
    def micro_batch(self) -> int:
        """Return how many micro-batches of its step come before the open task."""
        return 0 if self.open is None else self.open.micro_batch

    def require_open(self) -> OpenTask:
        """Return the open task.

        Raises:
            LocalProtocolError: no task is open.
        """
        if self.open is None:
            raise LocalProtocolError("no task is open")
        return self.open

    def end(self) -> None:
        """Close the open task, if any."""
        if self.open is not None and self.open.key.phase in STEP_PHASES:
            self._last = self.open
        self.open = None

    def note_reply(self) -> None:
        """Forget the last task, because the server answered the open one.

        After a share, it would not be enough to repeat the last step.
        """
        if self.require_open().key.phase in (*STEP_PHASES, SHARE):
            self._last = None

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
