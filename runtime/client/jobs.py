"""What a client runs for one task, or for one step of several micro-batches, piece by piece.

A job decides what runs next and what is sent, and waits for nothing: its caller passes what the
server replies.  Of the engine it sees only the executor.  ``runtime/js/src/client/jobs.ts`` is the
twin.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from splitonnx.errors import RemoteProtocolError, UsageError
from splitonnx.manifests import PartyManifest
from splitonnx.messages import TaskKey
from splitonnx.micro_batches import (
    MICRO_BATCH_WEIGHT,
    MICRO_BATCHES,
    check_accumulating,
    find_weights,
    split_batch,
)
from splitonnx.names import ACCUMULATE, PER_CLIENT, SHARE, TRAIN, UPDATE
from splitonnx.pipelines import (
    Operation,
    StepDivision,
    list_pieces,
    make_schedule,
    sends_data_alone,
)
from splitonnx.runtime.channels.greetings import SharingTerms
from splitonnx.runtime.client.metrics.dataset_means import DatasetMeans
from splitonnx.runtime.engine.dataflows import can_overlap
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


class StepPlan:
    """A training step of at most ``count`` micro-batches of nearly equal size, before it runs.

    Perform the phase ``weigh`` on each of ``parts``, and pass its results to :meth:`weigh`.

    Raises:
        UnusableData: the batch cannot be divided.
    """

    def __init__(
        self, manifest: PartyManifest, batch: Mapping[str, np.ndarray], count: int
    ) -> None:
        self.parts = split_batch(batch, manifest.phase(TRAIN).data, count)
        self._counts: list[dict[str, float]] = []

    def weigh(self, results: Sequence[Mapping[str, np.ndarray]]) -> None:
        """Find how much each micro-batch counts in the step.

        Raises:
            UnusableData: two losses weigh the parts differently.
        """
        self._counts = [
            {name: float(array) for name, array in counted.items()} for counted in results
        ]
        for part, weight in zip(self.parts, find_weights(self._counts), strict=True):
            part[MICRO_BATCH_WEIGHT] = np.array(weight, np.float32)

    def list_tasks(self, session: str, step: int) -> list[PlannedTask]:
        """List the tasks of the step: the micro-batches, and the update."""
        planned = [
            *((ACCUMULATE, part) for part in self.parts),
            (UPDATE, {MICRO_BATCHES: np.array(len(self.parts))}),
        ]
        return [
            PlannedTask(key=TaskKey(session, phase, step, number), data=data)
            for number, (phase, data) in enumerate(planned)
        ]

    def join(self, results: Sequence[Mapping[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """Return the means of the results of the step's tasks, which are the step's results."""
        means = DatasetMeans()
        for own, counted in zip(results, self._counts, strict=False):
            numbers = {name: float(a) for name, a in own.items() if a.ndim == 0}
            means.add({**numbers, **counted}, 1)
        return {name: np.array(value) for name, value in means.compute().items()}


def choose_in_flight(
    manifest: PartyManifest, terms: SharingTerms | None, division: StepDivision
) -> int:
    """Return how many micro-batches of a step this party can have unfinished at a time.

    ``terms`` are the server's; ``None`` means that there is no server.

    Raises:
        UsageError: the bundle or the server does not permit the division.
    """
    if division.count > 1:
        check_accumulating(manifest)
    if division.count > 1 and terms is not None and not terms.can_accumulate:
        raise UsageError(
            f"the server's policy '{terms.policy}' does not let a step consist of several "
            "micro-batches, or the server is of an earlier version; train without accumulate "
            "and micro_batches (--accumulate, --micro-batches), or serve with the policy "
            f"'{PER_CLIENT}'"
        )
    if division.in_flight == 1 or not can_overlap(manifest.phase(ACCUMULATE), manifest.party):
        return 1
    return division.in_flight


class Job:
    """The run of one task, or of the tasks of one step: micro-batches, and then the update.

    ``results`` has the results of each task that has ended, in order.  At most ``in_flight`` tasks
    are unfinished at a time.  The order in which they run does not change their results.
    ``pieces`` are those of each task, as of :func:`~splitonnx.pipelines.list_pieces`.
    """

    def __init__(
        self,
        executor: Executor,
        tasks: Sequence[PlannedTask],
        pieces: Sequence[Sequence[frozenset[str]]],
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
        self._pieces = pieces
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
            RemoteProtocolError: the task has ended, or does not expect these wires, or there are
                none.
            ArrayMismatch, ValueOutOfRange: a tensor does not match its declaration.
        """
        if key not in self._numbers:
            raise RemoteProtocolError(f"it answered {key}, which is not open")
        if not wires:  # as progress, such replies would hold the client up for ever
            raise RemoteProtocolError("its reply has no tensors")
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


class JobMaker:
    """What the runners of a client share: it numbers tasks, and makes jobs of them.

    ``seed`` determines the random masks of Dropout.  ``in_flight`` is the largest number of tasks
    of one step that are unfinished at a time.
    """

    def __init__(self, executor: Executor, *, seed: int) -> None:
        self.seed = seed
        self.in_flight = 1
        self._executor = executor
        self._others = itertools.count()  # numbers the tasks that are not training steps
        self._pieces: dict[str, tuple[frozenset[str], ...]] = {}  # by phase

    def divide(self, terms: SharingTerms | None, division: StepDivision) -> None:
        """Divide each step from now on, if that is possible; ``terms`` are the server's.

        Raises:
            UsageError: as raised by :func:`choose_in_flight`.
        """
        self.in_flight = choose_in_flight(self._executor.manifest, terms, division)

    def plan(self, session: str, phase: str, data: Mapping[str, np.ndarray]) -> PlannedTask:
        """Return a task of a phase that has no micro-batches."""
        number = self._executor.step if phase in (TRAIN, SHARE) else next(self._others)
        return PlannedTask(key=TaskKey(session, phase, number, 0), data=data)

    def make(self, tasks: Sequence[PlannedTask], learning_rate: float, *, permitted: int) -> Job:
        """Make the job of one task, or of the tasks of one step.

        ``permitted`` is how many tasks of one step the server lets be open at once.
        """
        return Job(
            self._executor,
            tasks,
            [self._find_pieces(task.key.phase) for task in tasks],
            in_flight=min(permitted, self.in_flight),
            seed=self.seed,
            learning_rate=learning_rate,
        )

    def _find_pieces(self, phase: str) -> tuple[frozenset[str], ...]:
        if phase not in self._pieces:
            manifest = self._executor.manifest
            self._pieces[phase] = list_pieces(manifest.phase(phase), manifest.party)
        return self._pieces[phase]
