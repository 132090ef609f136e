"""What a client runs for one task, or for one step of several micro-batches, piece by piece.

A job decides what runs next and what is sent, and waits for nothing: its caller passes what the
server replies.  Of the engine it sees only the executor.  ``runtime/js/src/client/jobs.ts`` is the
twin.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from splitonnx.errors import RemoteProtocolError
from splitonnx.manifests import PartyManifest
from splitonnx.messages import TaskKey
from splitonnx.names import UPDATE
from splitonnx.pipelines import Operation, list_pieces, make_schedule, sends_data_alone
from splitonnx.runtime.engine.executors import Executor


@dataclass(frozen=True, kw_only=True)
class PlannedTask:
    """A task that is to run: its key and the client's data."""

    key: TaskKey
    data: Mapping[str, np.ndarray] = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Sending:
    """Wires (named tensors) of a task, to be sent to the server."""

    key: TaskKey
    wires: Mapping[str, np.ndarray] = field(repr=False)


@dataclass(frozen=True, kw_only=True)
class Ended:
    """The end of a task: the server need not hear of it again."""

    key: TaskKey


class Job:
    """The run of one task, or of the tasks of one step: micro-batches, and then the update.

    ``results`` has the results of each task that has ended, in order.  At most ``in_flight`` tasks
    are unfinished at a time.  The order in which they run does not change their results.
    """

    def __init__(
        self,
        executor: Executor,
        tasks: Sequence[PlannedTask],
        *,
        in_flight: int,
        seed: int,
        learning_rate: float,
    ) -> None:
        self.results: list[dict[str, np.ndarray]] = []
        self._executor = executor
        self._tasks = tasks
        self._seed = seed
        self._learning_rate = learning_rate
        self._pieces = [_list_pieces(executor.manifest, task.key) for task in tasks]
        self._operations = deque(self._list_operations(in_flight))
        self._received: list[set[str]] = [set() for _ in tasks]
        self._numbers = {task.key: number for number, task in enumerate(tasks)}

    @property
    def is_done(self) -> bool:
        """Return whether every task has ended."""
        return not self._operations

    @property
    def is_ready(self) -> bool:
        """Return whether the next piece can run; otherwise the job waits for replies."""
        if not self._operations:
            return False
        operation = self._operations[0]
        return self._pieces[operation.task][operation.piece] <= self._received[operation.task]

    def begin(self) -> None:
        """Begin the first task, without running anything.

        Raises:
            SplitonnxError: as raised by :meth:`Executor.begin`; abandon the job.
        """
        self._begin(0)

    def work(self) -> Iterator[Sending | Ended]:
        """Run the next piece, and yield what is to be sent as soon as it is computed.

        Raises:
            SplitonnxError: as raised by :meth:`Executor.begin` and :meth:`Executor.advance`;
                abandon the job.
        """
        operation = self._operations.popleft()
        task = self._tasks[operation.task]
        if operation.piece == 0 and operation.task > 0:
            self._begin(operation.task)
        for wires in self._executor.advance(task.key):
            yield Sending(key=task.key, wires=wires)
        if operation.piece + 1 == len(self._pieces[operation.task]):
            self.results.append(self._executor.finish(task.key))
            yield Ended(key=task.key)

    def deliver(self, key: TaskKey, wires: Mapping[str, np.ndarray]) -> None:
        """Pass a reply of the server to its task.

        Raises:
            RemoteProtocolError: the task has ended, or does not expect these wires.
            ArrayMismatch, ValueOutOfRange: a tensor does not match its declaration.
        """
        if key not in self._numbers:
            raise RemoteProtocolError(f"it answered {key}, which is not open")
        self._executor.deliver(key, wires)
        self._received[self._numbers[key]].update(wires)

    def abandon(self) -> None:
        """Abort all tasks that have not ended, and of a step also those that have."""
        for task in reversed(self._tasks):
            self._executor.abandon(task.key)

    def _list_operations(self, in_flight: int) -> Sequence[Operation]:
        """Return the pieces of a single task, or the operations of a step's schedule."""
        *parts, last = map(len, self._pieces)
        if not parts:
            return [Operation(task=0, piece=piece, name=str(piece)) for piece in range(last)]
        manifest = self._executor.manifest
        schedule = make_schedule(
            parts[0],
            len(parts),
            in_flight,
            update_pieces=last,
            is_update_early=sends_data_alone(manifest.phase(UPDATE), manifest.party),
        )
        return schedule.operations

    def _begin(self, number: int) -> None:
        task = self._tasks[number]
        self._executor.begin(
            task.key, data=task.data, seed=self._seed, learning_rate=self._learning_rate
        )


def _list_pieces(manifest: PartyManifest, key: TaskKey) -> tuple[frozenset[str], ...]:
    return list_pieces(manifest.phase(key.phase), manifest.party)
