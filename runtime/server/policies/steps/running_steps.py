"""A step that has begun on a model of many clients: who takes part, and what runs of it next.

A step is one task, or a *chain*: the tasks of its micro-batches, and then its update.  If it is of
several clients, each has its own tasks, and one of the model's is made of one of each client.  The
model's micro-batch ``m`` is made of the clients' micro-batches ``m``; a client that has fewer than
the others waits with its update until they have sent theirs.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from splitonnx.errors import RemoteProtocolError
from splitonnx.messages import TaskKey
from splitonnx.names import ACCUMULATE, TRAIN, UPDATE
from splitonnx.runtime.server.policies.steps.row_weights import RowWeights
from splitonnx.runtime.server.policies.tasks import Task


@dataclass(kw_only=True, eq=False)
class RunningStep:
    """A step that has begun: its clients in order, and how many messages of each were handled.

    ``keys`` are those of the running task, and ``newest`` the newest of each client that takes
    part, by its session.  ``is_between`` means that the task is finished, and that another one of
    the step follows.  ``number`` and ``turn`` are those of the running task and of its next
    message.  ``rows`` are the rows that each client has in it.
    """

    keys: tuple[TaskKey, ...]
    learning_rate: float
    begun: float
    since: float  # when its clients were last answered
    newest: dict[str, TaskKey] = field(default_factory=dict)
    number: int = 0
    turn: int = 0
    rows: tuple[int, ...] = ()
    weights: RowWeights = field(default_factory=RowWeights)
    is_between: bool = False
    is_done_since: float | None = None  # when the first client asked for the update

    def __post_init__(self) -> None:
        """Have the clients of the first task take part."""
        self.newest = {key.session: key for key in self.keys}

    @property
    def lead(self) -> TaskKey:
        """Return the key of the running task of the client that comes first in it."""
        return self.keys[0]

    @property
    def own(self) -> TaskKey:
        """Return the key of the running task by which the model knows it."""
        first = next(iter(self.newest.values()))
        return TaskKey(first.session, self.lead.phase, first.step, self.number)

    @property
    def is_chain(self) -> bool:
        """Return whether the step consists of micro-batches."""
        return self.lead.phase != TRAIN

    @property
    def firsts(self) -> frozenset[TaskKey]:
        """Return the keys with which the clients began the step, and would begin it again."""
        phase = ACCUMULATE if self.is_chain else TRAIN
        return frozenset(TaskKey(k.session, phase, k.step, 0) for k in self.newest.values())

    def includes(self, key: TaskKey) -> bool:
        """Return whether a task is one of this step, whichever of its client's tasks it is."""
        newest = self.newest.get(key.session)
        return newest is not None and newest.step == key.step

    def note(self, key: TaskKey, now: float) -> None:
        """Note that a client begins its next task of the step."""
        self.newest[key.session] = key
        if key.phase == UPDATE and self.is_done_since is None:
            self.is_done_since = now

    def begin_next_task(self, arrived: Collection[TaskKey]) -> None:
        """Begin the next task if all clients have begun theirs, which have ``arrived``."""
        newest = tuple(self.newest.values())
        if not all(key in arrived for key in newest):
            return
        self.keys = tuple(key for key in newest if key.phase == ACCUMULATE) or newest
        self.number, self.turn, self.is_between = self.number + 1, 0, False

    def list_silent(self, sent: Collection[str]) -> tuple[str, ...]:
        """Return the sessions that the step waits for; ``sent`` are those with a message there."""
        due = self.newest if self.is_between else [key.session for key in self.keys]
        return tuple(session for session in due if session not in sent)

    def list_unfinished(self, before: float) -> tuple[str, ...]:
        """Return the sessions that accumulate, if another asked for the update at ``before``."""
        if self.is_done_since is None or self.is_done_since > before:
            return ()
        return tuple(name for name, key in self.newest.items() if key.phase == ACCUMULATE)

    def check_rates(self, tasks: Sequence[Task]) -> None:
        """Check that the learning rate is that with which the step began.

        Raises:
            RemoteProtocolError: a client's is another.
        """
        for task in tasks:
            if task.learning_rate != self.learning_rate:
                raise RemoteProtocolError(
                    f"its learning rate {task.learning_rate:g} is not that of the first "
                    f"micro-batch of its step, {self.learning_rate:g}"
                )
