"""A client's record of an open task: the messages sent, and the number of replies received."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from splitonnx.errors import RemoteProtocolError
from splitonnx.messages import TaskKey, Tensors


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
