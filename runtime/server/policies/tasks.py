"""The data that sessions and policies exchange: tasks, deliveries, answers and reports.

Everything can be sent to another process.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from splitonnx.errors import SplitonnxError
from splitonnx.messages import TaskKey, Tensors


@dataclass(frozen=True, kw_only=True, eq=False)
class Task:
    """Tensors of a client's task, which a session submits to the policy.

    ``key.step`` is the client's own step.  ``turn`` counts the submissions that belong to one task;
    the first one, number 0, begins the task with the client's ``seed`` and ``learning_rate``.
    """

    key: TaskKey
    turn: int
    seed: int
    learning_rate: float
    tensors: Mapping[str, np.ndarray] = field(repr=False)


def make_task(message: Tensors, tensors: Mapping[str, np.ndarray]) -> Task:
    """Return the submission that a client's message is."""
    return Task(
        key=message.key,
        turn=message.turn,
        seed=message.seed,
        learning_rate=message.learning_rate,
        tensors=tensors,
    )


@dataclass(frozen=True, kw_only=True, eq=False)
class Delivery:
    """Tensors for the client of any session, or the end of its task, or both.

    ``key`` is the task's key as it was submitted.  ``version`` is the number of updates that led to
    the model with which the tensors were computed.  ``is_last`` means that the task is finished and
    its changes to the model are committed.  ``error`` is why the task ended without that.  ``turn``
    is the number of the submission that it answers, by default the newest one.  ``handled`` is how
    many of the task's submissions were handled whole, if others decide when, and 0 if it is not
    known.
    """

    key: TaskKey
    version: int
    tensors: Mapping[str, np.ndarray] = field(default_factory=dict, repr=False)
    is_last: bool = False
    error: SplitonnxError | None = None
    turn: int | None = None
    handled: int = 0


@dataclass(frozen=True, kw_only=True)
class Joined:
    """The answer to a session that joins: its owner, and the client's step that it continues at.

    ``is_shared`` means that others train the session's model, too, so that a step may wait for
    theirs.  ``is_joint`` means that a step is one with theirs, so that it cannot be taken back once
    it has finished.
    """

    owner: str
    step: int
    is_shared: bool = False
    is_joint: bool = False


@dataclass(frozen=True, kw_only=True)
class RoundReport:
    """How many rounds were closed, and what the open round waits for.

    ``members`` are the clients that a round waits for, and ``waiting`` those that wait for the
    others.  ``late`` counts the shares that came after their round was closed.
    """

    closed: int = 0
    members: int = 0
    waiting: int = 0
    late: int = 0


@dataclass(frozen=True, kw_only=True)
class MemberReport:
    """What a policy knows of one session.

    ``version`` is that of the model that the session trains.  ``round`` is the number of the newest
    round whose joined tensors the session has received, or ``None`` if it has received none.
    ``rounds_behind`` counts the rounds since then, and is ``None`` if the policy has no rounds.
    ``is_waiting`` means that the session has shared and waits for the others.
    """

    version: int
    round: int | None = None
    rounds_behind: int | None = None
    is_waiting: bool = False
