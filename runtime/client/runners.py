"""The task runner, which runs a client's tasks together with the server if the model is split.

This module connects the training run, the channel, and the executor that runs the client's part.
It makes both sides write checkpoints, and returns to an earlier step if the server lost steps.  The
training loop handles data, epochs and records.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Literal, TypeAlias

import numpy as np

from splitonnx.errors import LocalProtocolError, NotSaved, StepRestarted, StepsLost
from splitonnx.interrupts import check_interrupt
from splitonnx.names import ACCUMULATE, SHARE, TRAIN, UPDATE, WEIGH
from splitonnx.pipelines import StepDivision
from splitonnx.runtime.channels.channels import Channel
from splitonnx.runtime.channels.greetings import SharingTerms
from splitonnx.runtime.client.jobs import (
    Job,
    JobMaker,
    PlannedTask,
    Sending,
    StepPlan,
)
from splitonnx.runtime.client.training_runs import TrainingRun
from splitonnx.runtime.engine.executors import Executor
from splitonnx.runtime.storage.positions import DataPosition
from splitonnx.sharing import LEAVES, ROUND, SAMPLES, list_joined, name_own

WhenUnsaved: TypeAlias = Literal["stop", "continue"]
"""What training does if a checkpoint cannot be written."""

MOST_RESTARTS = 100
"""How many times in a row a step of several micro-batches may begin again."""

_logger = logging.getLogger("splitonnx.client")


class TaskRunner:
    """A runner that performs a client's tasks, one at a time.

    ``channel`` is the connection to the server, or ``None`` for an unsplit model.  ``seed``
    determines the random masks of Dropout.  ``position`` is the position in the data that
    corresponds to the current state, or ``None`` if it is not known.  The caller sets it, and the
    runner changes it when steps are lost.
    """

    def __init__(
        self, executor: Executor, run: TrainingRun, channel: Channel | None, *, seed: int
    ) -> None:
        self.executor = executor
        self.run = run
        self.position: DataPosition | None = None
        self._channel = channel
        self._jobs = JobMaker(executor, seed=seed)
        self._closed = self._is_half_published = False

    @property
    def terms(self) -> SharingTerms:
        """Return how the server joins what its clients learn."""
        terms = None if self._channel is None else self._channel.terms
        return terms or SharingTerms()

    @property
    def is_at_start(self) -> bool:
        """Return whether the session has not made a step since it began or was published."""
        return self.run.start == self.executor.step

    @property
    def traffic(self) -> tuple[int, int]:
        """Return how many bytes have been sent and received so far."""
        return (0, 0) if self._channel is None else self._channel.traffic

    def perform(
        self, phase: str, data: Mapping[str, np.ndarray], learning_rate: float
    ) -> dict[str, np.ndarray]:
        """Run one task to completion, commit its changes to the state, and return its results.

        Raises:
            StepsLost: the server lost steps; both sides have gone back to an earlier step and can
                continue.
            DataError, StageFailed, ProtocolError: the task failed and was aborted; the runner is
                closed.
            KeyboardInterrupt: Ctrl-C was pressed earlier, and other code discarded the exception.
        """
        (results,) = self._perform([self._jobs.plan(self.run.session, phase, data)], learning_rate)
        return results

    def divide(self, division: StepDivision) -> StepDivision:
        """Divide each step from now on, if that is possible; return the division.

        Raises:
            UsageError: the bundle or the server does not permit it.
        """
        self._jobs.divide(None if self._channel is None else self.terms, division)
        return division

    def prepare_training(self, accumulate: int) -> None:
        """Load the stages of training now, instead of in the first step.

        Raises:
            ForbiddenGraph, WrongRuntime, StageFailed: see :meth:`Executor.prepare`.
        """
        for phase in (TRAIN,) if accumulate == 1 else (WEIGH, ACCUMULATE, UPDATE):
            self.executor.prepare(phase)

    def train(
        self, batch: Mapping[str, np.ndarray], learning_rate: float, accumulate: int
    ) -> dict[str, np.ndarray]:
        """Perform one training step on a batch, and return the step's results.

        The batch is divided into at most ``accumulate`` micro-batches of nearly equal size, whose
        gradients are added up before the state changes.

        Raises:
            UnusableData: the batch cannot be divided, or two losses weigh its parts differently.
            StepRestarted: the server lost the step's micro-batches again and again.
            StepsLost, DataError, StageFailed, ProtocolError: see :meth:`perform`.
        """
        if accumulate == 1:
            return self.perform(TRAIN, batch, learning_rate)
        plan = StepPlan(self.executor.manifest, batch, accumulate)
        plan.weigh([self.perform(WEIGH, part, 0.0) for part in plan.parts])
        if self._channel is not None:
            with ExitStack() as ending, self._going_back():
                ending.push(self._close_after)
                self._channel.widen(self._jobs.in_flight)
        for _ in range(MOST_RESTARTS):
            with suppress(StepRestarted):
                return self._accumulate(plan, learning_rate)
        return self._accumulate(plan, learning_rate)

    def _accumulate(self, plan: StepPlan, learning_rate: float) -> dict[str, np.ndarray]:
        """Add up the gradients of micro-batches, and update; return the means of the results."""
        tasks = plan.list_tasks(self.run.session, self.executor.step)
        return plan.join(self._perform(tasks, learning_rate))

    def _perform(
        self, tasks: Sequence[PlannedTask], learning_rate: float
    ) -> list[dict[str, np.ndarray]]:
        """Run one task, or the tasks of one step, and return the results of each."""
        permitted = 1 if self._channel is None else self._channel.in_flight
        job = self._jobs.make(tasks, learning_rate, permitted=permitted)
        with ExitStack() as undo:
            undo.callback(job.abandon)
            self._require_open()
            check_interrupt()
            job.begin()
            try:
                with ExitStack() as ending:
                    ending.push(self._close_after)
                    with self._going_back():
                        self._exchange(job, learning_rate)
            finally:
                if self._channel is not None:
                    self._channel.end_all()
            undo.pop_all()
        return job.results

    def share(self, samples: int, *, leaves: bool) -> int:
        """Share this part's parameters, replace them by the joined ones, and return the round.

        This waits until the server has joined what the clients of the round learned.  ``samples``
        is the number of samples trained with since the last time, and ``leaves`` means that the
        client will not share again.

        Raises:
            StepsLost, ProtocolError: see :meth:`perform`.
        """
        state = self.executor.state()
        own = {name_own(name): state[name] for name in list_joined(self.executor.manifest)}
        counts = {SAMPLES: np.array(samples, np.int64), LEAVES: np.array(leaves, np.int64)}
        return int(self.perform(SHARE, {**own, **counts}, 0.0)[ROUND])

    def _close_after(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> None:
        """Close the session after any error, including Ctrl-C, except if steps were lost."""
        if kind is not None and not issubclass(kind, StepsLost | StepRestarted):
            self.close()

    def checkpoint(
        self, position: DataPosition, when_unsaved: WhenUnsaved, *, keep: bool = False
    ) -> bool:
        """Make both sides write a checkpoint, one after the other; return whether both did.

        ``keep`` means that :meth:`return_to` may return to this step later.

        Each side keeps its two newest checkpoints.  As long as neither side gets two checkpoints
        ahead of the other, both have a checkpoint of the same step.  Therefore, if the client could
        not write its last checkpoint, the client writes first; otherwise, the server writes first.

        Raises:
            NotSaved: a side could not write its checkpoint, and ``when_unsaved`` is ``"stop"``.
            StepsLost, ProtocolError: see :meth:`perform`.
        """
        try:
            if self.run.is_behind:
                self.run.write(self.executor, position, keep=keep)
                self._save_remotely(keep=keep)
            else:
                self._save_remotely(keep=keep)
                self.run.write(self.executor, position, keep=keep)
        except NotSaved as error:
            if when_unsaved == "stop":
                raise
            _logger.warning("%s; training continues", error)
            return False
        return True

    def return_to(self, step: int) -> None:
        """Make both sides go back to an earlier step, which :meth:`checkpoint` was told to keep.

        Raises:
            BundleError: the client's state of that step is not there any more.
            StepsLost, ProtocolError: see :meth:`perform`.
        """
        self._require_open()
        with self._going_back():
            self.position = self.run.go_back(self.executor, step)
            if self._channel is not None:
                self._channel.return_to_step()

    @property
    def can_return(self) -> bool:
        """Return whether both sides can go back to an earlier step when they are told to."""
        return self._channel is None or self._channel.can_reconnect

    def publish(self) -> None:
        """Make the server and then the client save their states as the outcome of the training.

        Raises:
            BundleError: the bundle exists only in memory, or the folder cannot be written.
            NotSaved: the server could not save its state, or the client's state contains NaN or
                infinity.
            FolderInUse: another client is training in the folder.
            StepsLost, ProtocolError: see :meth:`perform`.
        """
        if self._channel is not None:
            self._require_open()
        self.executor.check_outcome()  # before the server publishes its part
        self.run.hold()
        if self._channel is not None:
            self._is_half_published = True
            self._save_remotely(publish=True)
        self.run.publish(self.executor, self.position)
        self._is_half_published = False

    def close(self) -> None:
        """End the session and close the connection; may be called twice.

        If the run can still be resumed, only the connection is closed, because ending the session
        would make the server delete its checkpoints.  A run can be resumed if it is unfinished and
        has checkpoints, or if the server has published its state but the client has not.
        """
        try:
            if not self._closed and self._channel is not None:
                is_unfinished = self._is_half_published or self.run.has_checkpoints
                self._channel.close(for_good=not is_unfinished)
        finally:
            self._closed = True
            self.run.release()

    def _require_open(self) -> None:
        if self._closed:
            raise LocalProtocolError("the client is closed")

    def _exchange(self, job: Job, learning_rate: float) -> None:
        """Run a job, and exchange with the server what it sends and waits for."""
        while not job.is_done:
            if not job.is_ready:
                job.deliver(*self._remote().receive_wires())
                continue
            for event in job.work():
                if isinstance(event, Sending):
                    self._remote().send_wires(
                        event.key, event.wires, self._jobs.seed, learning_rate
                    )
                elif self._channel is not None:
                    self._channel.end(event.key)

    def _save_remotely(self, *, publish: bool = False, keep: bool = False) -> None:
        if self._channel is None:
            return
        with self._going_back():
            reason = self._channel.save(self.executor.step, publish=publish, keep=keep)
        if reason:
            raise NotSaved("the server's folder", reason)

    @contextmanager
    def _going_back(self) -> Iterator[None]:
        """If the server lost steps, restore the step to which it fell back."""
        try:
            yield
        except StepsLost as lost:
            self.position = self.run.go_back(self.executor, lost.step)
            raise

    def _remote(self) -> Channel:
        if self._channel is None:
            raise LocalProtocolError("a stage waits for a value that no other stage gives")
        return self._channel
