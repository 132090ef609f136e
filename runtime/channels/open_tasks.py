"""A client's account of a task that is open: what it said, and which answer is due."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from splitonnx.errors import RemoteProtocolError
from splitonnx.messages import TaskKey, Tensors


@dataclass(kw_only=True)
class OpenTask:
    """What went out in a task, how many messages came in, and which is due on this connection.

    On a new connection all that went out goes out again, and every answer may come again, in
    order and once.
    """

    key: TaskKey
    sent: list[tuple[Tensors, Mapping[str, np.ndarray]]] = field(default_factory=list)
    received: int = 0
    due: int = 0

    def check(self, message: Tensors) -> None:
        """Raise unless a message is the one that is due.

        Raises:
            RemoteProtocolError: it belongs to another task, came before, or comes too early.
        """
        if message.key != self.key:
            raise RemoteProtocolError(f"it answered {message.key}, open is {self.key}")
        if message.turn != self.due:
            raise RemoteProtocolError(f"it sent message {message.turn} where {self.due} was due")
        self.due += 1
