"""The task runner of a client on an event loop: it performs tasks together with the server.

Stages run in a thread, one piece after the other, while the loop sends and receives.  What a step
consists of is planned in :mod:`jobs`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, suppress

import numpy as np

from splitonnx.errors import LocalProtocolError, NotSaved, StepRestarted, StepsLost
from splitonnx.names import TRAIN, WEIGH
from splitonnx.pipelines import StepDivision
from splitonnx.runtime.channels.asynchronous.channels import AsyncChannel
from splitonnx.runtime.channels.asynchronous.threads import WorkThread
from splitonnx.runtime.channels.greetings import SharingTerms
from splitonnx.runtime.client.jobs import (
    Job,
    JobMaker,
    PlannedTask,
    Sending,
    StepPlan,
)
from splitonnx.runtime.client.runners import MOST_RESTARTS
from splitonnx.runtime.client.training_runs import TrainingRun
from splitonnx.runtime.engine.executors import Executor


class AsyncTaskRunner:
    """A runner that performs a client's tasks on an event loop; only one method may run at a time.

    ``channel`` is the connection to the server, or ``None`` for an unsplit model.  ``thread`` runs
    the stages.  ``seed`` determines the random masks of Dropout.
    """

    def __init__(
        self,
        executor: Executor,
        run: TrainingRun,
        channel: AsyncChannel | None,
        thread: WorkThread,
        *,
        seed: int,
    ) -> None:
        self._executor = executor
        self._run = run
        self._channel = channel
        self._thread = thread
        self._jobs = JobMaker(executor, seed=seed)
        self._closed = self._is_half_published = False

    @property
    def terms(self) -> SharingTerms:
        """Return how the server joins what its clients learn."""
        terms = None if self._channel is None else self._channel.terms
        return terms or SharingTerms()

    @property
    def is_closed(self) -> bool:
        """Return whether no task can be performed any more."""
        return self._closed

    def divide(self, division: StepDivision) -> None:
        """Divide each step from now on, if that is possible.

        Raises:
            UsageError: the bundle or the server does not permit it.
        """
        self._jobs.divide(None if self._channel is None else self.terms, division)

    async def perform(
        self, phase: str, data: Mapping[str, np.ndarray], learning_rate: float
    ) -> dict[str, np.ndarray]:
        """Run one task to completion, commit its changes to the state, and return its results.

        Raises:
            StepsLost: the server lost steps; both sides have gone back to an earlier step and can
                continue.
            DataError, StageFailed, ProtocolError, CancelledError: the task failed and was aborted;
                the runner is closed.
        """
        task = self._jobs.plan(self._run.session, phase, data)
        (results,) = await self._perform([task], learning_rate)
        return results

    async def train(
        self, batch: Mapping[str, np.ndarray], learning_rate: float, accumulate: int
    ) -> dict[str, np.ndarray]:
        """Perform one training step on a batch, and return the step's results.

        The batch is divided into at most ``accumulate`` micro-batches of nearly equal size, whose
        gradients are added up before the state changes.

        Raises:
            UnusableData: the batch cannot be divided, or two losses weigh its parts differently.
            StepRestarted: the server lost the step's micro-batches again and again.
            StepsLost, DataError, StageFailed, ProtocolError, CancelledError: see :meth:`perform`.
        """
        if accumulate == 1:
            return await self.perform(TRAIN, batch, learning_rate)
        plan = StepPlan(self._executor.manifest, batch, accumulate)
        plan.weigh([await self.perform(WEIGH, part, 0.0) for part in plan.parts])
        if self._channel is not None:
            async with AsyncExitStack() as ending, self._going_back():
                ending.push_async_exit(self._close_after)
                await self._channel.widen(self._jobs.in_flight)
        for _ in range(MOST_RESTARTS):
            with suppress(StepRestarted):
                return await self._accumulate(plan, learning_rate)
        return await self._accumulate(plan, learning_rate)

    async def publish(self) -> None:
        """Make the server and then the client save their states as the outcome of the training.

        Raises:
            BundleError: the bundle exists only in memory, or the folder cannot be written.
            NotSaved: the server could not save its state, or the client's state contains NaN or
                infinity.
            FolderInUse: another client is training in the folder.
            StepsLost, ProtocolError: see :meth:`perform`.
        """
        if self._channel is not None:
            self.require_open()
        await self._thread.run(self._executor.check_outcome)  # before the server publishes its part
        self._run.hold()
        if self._channel is not None:
            self._is_half_published = True
            async with self._going_back():
                reason = await self._channel.save(self._executor.step, publish=True)
            if reason:
                raise NotSaved("the server's folder", reason)
        await self._thread.run(self._run.publish, self._executor, None)
        self._is_half_published = False

    async def close(self) -> None:
        """End the session and close the connection; may be called twice.

        If the run can still be resumed, only the connection is closed; see
        :meth:`~splitonnx.runtime.client.runners.TaskRunner.close`.
        """
        try:
            if not self._closed and self._channel is not None:
                is_unfinished = self._is_half_published or self._run.has_checkpoints
                await self._channel.close(for_good=not is_unfinished)
        finally:
            self._closed = True
            self._run.release()

    def require_open(self) -> None:
        """Check that the runner is not closed.

        Raises:
            LocalProtocolError: it is.
        """
        if self._closed:
            raise LocalProtocolError("the client is closed")

    async def _accumulate(self, plan: StepPlan, learning_rate: float) -> dict[str, np.ndarray]:
        """Add up the gradients of micro-batches, and update; return the means of the results."""
        tasks = plan.list_tasks(self._run.session, self._executor.step)
        return plan.join(await self._perform(tasks, learning_rate))

    async def _perform(
        self, tasks: Sequence[PlannedTask], learning_rate: float
    ) -> list[dict[str, np.ndarray]]:
        """Run one task, or the tasks of one step, and return the results of each."""
        permitted = 1 if self._channel is None else self._channel.in_flight
        job = self._jobs.make(tasks, learning_rate, permitted=permitted)
        with ExitStack() as undo:
            undo.callback(job.abandon)
            try:
                self.require_open()
                await self._thread.run(job.begin)
                async with AsyncExitStack() as ending, self._going_back():
                    ending.push_async_exit(self._close_after)
                    await self._exchange(job, learning_rate)
            finally:
                if self._channel is not None:
                    self._channel.end_all()
            undo.pop_all()
        return job.results

    async def _exchange(self, job: Job, learning_rate: float) -> None:
        """Run a job, and exchange with the server what it sends and waits for."""
        while not job.is_done:
            if not job.is_ready:
                await self._thread.run(job.deliver, *await self._remote().receive_wires())
                continue
            events = job.work()
            while (event := await self._thread.run(next, events, None)) is not None:
                if isinstance(event, Sending):
                    await self._remote().send_wires(
                        event.key, event.wires, self._jobs.seed, learning_rate
                    )
                elif self._channel is not None:
                    self._channel.end(event.key)

    async def _close_after(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: object
    ) -> None:
        """Close the session after any error, including cancellation, except if steps were lost."""
        if kind is not None and not issubclass(kind, StepsLost | StepRestarted):
            await self.close()

    @asynccontextmanager
    async def _going_back(self) -> AsyncIterator[None]:
        """If the server lost steps, restore the step to which it fell back."""
        try:
            yield
        except StepsLost as lost:
            await self._thread.run(self._run.go_back, self._executor, lost.step)
            raise

    def _remote(self) -> AsyncChannel:
        if self._channel is None:
            raise LocalProtocolError("a stage waits for a value that no other stage gives")
        return self._channel
