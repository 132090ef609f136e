"""The public client for programs that run on an asyncio event loop.

:class:`AsyncClient` does what :class:`~splitonnx.runtime.client.clients.Client` does, except
training over epochs, and never blocks the loop while it computes or waits.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Self

import numpy as np

from splitonnx.bundles import PartyBundle
from splitonnx.errors import LocalProtocolError
from splitonnx.manifests import PartyManifest
from splitonnx.micro_batches import enlarge
from splitonnx.names import EVALUATE, PREDICT, TRAIN
from splitonnx.pipelines import USUAL_IN_FLIGHT, choose_division
from splitonnx.runtime.channels.asynchronous.channels import AsyncChannel
from splitonnx.runtime.channels.asynchronous.threads import WorkThread
from splitonnx.runtime.channels.asynchronous.transports import AsyncDial
from splitonnx.runtime.channels.asynchronous.websockets import choose_dial
from splitonnx.runtime.channels.credentials import Credentials
from splitonnx.runtime.channels.greetings import SharingTerms
from splitonnx.runtime.channels.retries import Backoff
from splitonnx.runtime.client.asynchronous.runners import AsyncTaskRunner
from splitonnx.runtime.client.datasets import (
    Batch,
    Dataset,
    DataSource,
    check_batch,
    check_finite,
    join_outputs,
)
from splitonnx.runtime.client.metrics.choices import choose_metrics
from splitonnx.runtime.client.metrics.evaluations import EvaluationTask, advance, evaluate
from splitonnx.runtime.client.options import (
    LearningRate,
    check_client,
    list_kept,
    open_whole,
    plan_joining,
    require_phase,
    require_positive,
)
from splitonnx.runtime.client.training_loops import (
    choose_rate,
    select_outputs,
    warn_of_undefined,
)
from splitonnx.runtime.client.training_runs import TrainingRun
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.engine.executors import Executor
from splitonnx.runtime.engine.placements import Placement
from splitonnx.runtime.engine.providers import CPU


class AsyncClient:
    """A client that trains and runs its part of a split model, on an asyncio event loop.

    Use it with ``async with``, or await :meth:`open` and :meth:`close`.  Stages run in a thread of
    the client's own, one after the other, while the loop sends and receives.  Methods that are
    called while another one runs wait for it, and run in the order of the calls.

    If an error occurs during a task, or the call is cancelled, the client is closed, and nothing of
    the task still runs when control returns.  Its state is then as before the task, or, if a step
    was cancelled that was complete already, as after it.  A call that was cancelled while it waited
    for another one changes nothing.

    The arguments are those of :class:`~splitonnx.runtime.client.clients.Client`, except that
    ``server`` is a URL or a function whose result is awaited: an open transport.  To train over
    epochs, use ``Client.fit``, in a thread (``asyncio.to_thread``) if a loop runs.
    """

    def __init__(
        self,
        bundle: str | Path | PartyBundle,
        server: str | AsyncDial | None = None,
        *,
        credentials: Credentials | None = None,
        threads: int | None = None,
        provider: str = CPU,
        seed: int = 0,
        resume: bool = False,
        give_up_after: float | None = None,
        share: bool = False,
        trusted: bool = False,
    ) -> None:
        self._bundle = bundle
        self._server = server
        self._credentials = credentials
        self._seed = seed
        self._resume = resume
        self._give_up_after = give_up_after
        self._share = share
        self._make_engine = partial(Engine, threads, provider=provider, trusted=trusted)
        self._engine: Engine | None = None
        self._run: TrainingRun | None = None
        self._opened: _Opened | None = None
        self._is_used = False
        self._turn = asyncio.Lock()
        self._running: asyncio.Task[object] | None = None  # whose turn it is
        self._is_ended = False  # by a call of close
        self._thread = WorkThread(self._stop_stages)
        self._told: dict[str, str] = {}  # why a metric was not defined, told once

    async def __aenter__(self) -> Self:
        return await self.open()

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def open(self) -> Self:
        """Load the bundle, connect to the server, and return this client.

        Raises:
            LocalProtocolError: this client was opened before.
            BundleError, FormatError, FolderInUse, UsageError, WrongRuntime, ConnectionLost,
                BundleMismatch, ServerBusy, SharingNotPermitted, RemoteFault: see
                :class:`~splitonnx.runtime.client.clients.Client`.
        """
        if self._is_used:
            raise LocalProtocolError("a client is opened once; make another one")
        self._is_used = True
        async with self._taking_turn():
            with ExitStack() as undo:  # if no client is made
                undo.callback(self._thread.close)
                undo.callback(self._release)
                executor, run = await self._thread.run(self._load)
                channel = await self._connect(executor, run)
                undo.pop_all()
            runner = AsyncTaskRunner(executor, run, channel, self._thread, seed=self._seed)
            self._opened = _Opened(executor, run, runner)
        return self

    @property
    def manifest(self) -> PartyManifest:
        """Return the manifest of this part, which declares every tensor that the part sends."""
        return self._require_opened().executor.manifest

    @property
    def steps(self) -> int:
        """Return how many training steps this part has performed since the bundle was created."""
        return self._require_opened().executor.step

    @property
    def terms(self) -> SharingTerms:
        """Return whether and how the server joins what its clients learn."""
        return self._require_opened().runner.terms

    @property
    def placement(self) -> Placement | None:
        """Return what the provider left to the CPU, once it is known; ``None`` for ``cpu``."""
        return None if self._engine is None else self._engine.describe_placement()

    @property
    def session(self) -> str:
        """Return the name of this client's session; the server uses the same name."""
        return self._require_opened().run.session

    async def step(
        self,
        batch: Batch,
        *,
        learning_rate: LearningRate = None,
        accumulate: int = 1,
        micro_batches: int = 1,
        in_flight: int = USUAL_IN_FLIGHT,
    ) -> dict[str, np.ndarray]:
        """Perform one training step on a batch, and return the step's results, ``loss`` first.

        The last three arguments divide the batch as in
        :meth:`~splitonnx.runtime.client.clients.Client.fit`.

        Raises:
            UsageError: the step cannot be divided.
            DataError, StageFailed, ConnectionLost, RemoteFault: see
                :meth:`~splitonnx.runtime.client.clients.Client.fit`.
        """
        async with self._calling() as opened:
            specs = require_phase(self.manifest, TRAIN).data
            division = choose_division(accumulate, micro_batches, in_flight)
            opened.runner.divide(division)
            check_batch(batch, enlarge(specs, division.count), opened.kept)
            await self._thread.run(check_finite, batch, "")
            rate = choose_rate(self.manifest, learning_rate, self.steps)
            return await opened.runner.train(batch, rate, division.count)

    async def evaluate(
        self, data: DataSource, *, batch_size: int = 32, metrics: Sequence[str] = ()
    ) -> dict[str, float]:
        """Evaluate the model on the data, and return the mean of each result over all samples.

        See :meth:`~splitonnx.runtime.client.clients.Client.evaluate`.

        Raises:
            UsageError: the bundle has no evaluation phase, or a metric does not fit it.
            DataError, StageFailed, ConnectionLost, RemoteFault: see :meth:`step`.
        """
        require_positive(batch_size=batch_size)
        async with self._calling() as opened:
            _, batches = await self._thread.run(self._open_data, data, EVALUATE, batch_size)
            tasks = evaluate(self.manifest, batches, choose_metrics(metrics, self.manifest))
            rate = choose_rate(self.manifest, None, self.steps)
            found = await self._thread.run(advance, tasks)
            while isinstance(found, EvaluationTask):
                results = await opened.runner.perform(found.phase, found.data, rate)
                found = await self._thread.run(advance, tasks, results)
            warn_of_undefined(found, self._told)
            return found.numbers

    async def predict(self, data: DataSource, *, batch_size: int = 32) -> dict[str, np.ndarray]:
        """Run the model on the data and return its outputs, joined along the axis of the samples.

        An output that is a single number per batch has one number for each batch.

        Raises:
            UsageError: there are several batches, and an output has no axis for the samples or
                more than one, or differs in another dimension, too; use :meth:`predict_batches`.
            DataError, StageFailed, ConnectionLost, RemoteFault: see :meth:`step`.
        """
        require_positive(batch_size=batch_size)
        async with self._calling() as opened:
            dataset, batches = await self._thread.run(self._open_data, data, PREDICT, batch_size)
            joinable, axes = await self._thread.run(plan_joining, self.manifest, dataset, batches)
            outputs = []
            while (batch := await self._thread.run(next, joinable, None)) is not None:
                outputs.append(await self._predict(opened.runner, batch))
            return await self._thread.run(join_outputs, outputs, axes)

    async def predict_batches(
        self, data: DataSource, *, batch_size: int = 32
    ) -> AsyncIterator[dict[str, np.ndarray]]:
        """Check the data, and yield the outputs of each batch in order.

        Other methods may be called between two batches.

        Raises:
            DataError, StageFailed, ConnectionLost, RemoteFault: see :meth:`step`.
        """
        require_positive(batch_size=batch_size)
        async with self._calling():
            _, batches = await self._thread.run(self._open_data, data, PREDICT, batch_size)
        while True:
            async with self._calling() as opened:
                batch = await self._thread.run(next, batches, None)
                if batch is None:
                    return
                outputs = await self._predict(opened.runner, batch)
            yield outputs

    async def state(self) -> dict[str, np.ndarray]:
        """Return the state of this part as read-only arrays, including the optimizer's state.

        This waits for calls that began earlier, and is possible after the client was closed, too.
        """
        async with self._turn:
            return self._require_opened().executor.state()

    async def save(self) -> None:
        """Write the trained state to the bundle folders, first on the server, then on the client.

        Raises:
            BundleError: the bundle exists only in memory, or the folder cannot be written.
            NotSaved: the server could not save its state, or the client's state contains NaN or
                infinity.
            FolderInUse: another client is training in the folder.
            StepsLost: the server lost steps, and both sides went back to an earlier step.
            ConnectionLost, RemoteFault: see :meth:`step`.
        """
        async with self._calling() as opened:
            with ExitStack() as undo:
                undo.callback(opened.run.release)
                await opened.runner.publish()
                undo.pop_all()

    async def close(self) -> None:
        """End the session and close the connection; may be called twice.

        A call that is running ends first: it raises ``LocalProtocolError``, and so do the calls
        that wait for it.
        """
        self._is_used = True
        if self._running is not None:
            self._is_ended = True
            self._running.cancel()
        async with self._turn:
            try:
                if self._opened is not None:
                    await self._opened.runner.close()
            finally:
                self._thread.close()

    def _release(self) -> None:
        if self._run is not None:
            self._run.release()

    def _load(self) -> tuple[Executor, TrainingRun]:
        bundle = self._bundle
        party = bundle if isinstance(bundle, PartyBundle) else PartyBundle.load(bundle)
        check_client(party.manifest, has_server=self._server is not None, seed=self._seed)
        self._engine = self._make_engine()
        executor = Executor(party, self._engine)
        self._run = TrainingRun.open(executor, resume=self._resume)
        return executor, self._run

    async def _connect(self, executor: Executor, run: TrainingRun) -> AsyncChannel | None:
        """Open the session's channel, and go to the step at which both sides continue."""
        if self._server is None:
            return None
        channel = AsyncChannel(
            choose_dial(self._server, self._credentials),
            self._thread,
            manifest=executor.manifest,
            session=run.session,
            find_resume_point=lambda: run.find_resume_point(executor.step),
            backoff=Backoff(give_up_after=self._give_up_after),
            can_share=self._share,
        )
        async with AsyncExitStack() as undo:
            undo.push_async_callback(channel.close, for_good=False)
            await channel.open(is_patient=self._resume or self._give_up_after is not None)
            if channel.step != executor.step:
                await self._thread.run(run.go_back, executor, channel.step)
            undo.pop_all()
        return channel

    @asynccontextmanager
    async def _taking_turn(self) -> AsyncIterator[None]:
        """Wait for earlier calls; raise ``LocalProtocolError`` if :meth:`close` ends this one."""
        async with self._turn:
            task = asyncio.current_task()
            assert task is not None  # as this is a coroutine
            cancellations = task.cancelling()
            self._running, self._is_ended = task, False
            try:
                yield
            except asyncio.CancelledError:
                if self._is_ended and task.uncancel() <= cancellations:
                    raise LocalProtocolError("the client was closed during this call") from None
                raise
            finally:
                self._running = None

    @asynccontextmanager
    async def _calling(self) -> AsyncIterator[_Opened]:
        """Wait for earlier calls; if this one is cancelled while it runs, close the client."""
        async with self._taking_turn():
            opened = self._require_opened()
            opened.runner.require_open()
            try:
                yield opened
            except asyncio.CancelledError:
                await opened.runner.close()
                raise
            finally:
                if opened.runner.is_closed:
                    self._thread.close()

    def _require_opened(self) -> _Opened:
        if self._opened is None:
            raise LocalProtocolError(
                "the client is not open; use `async with`, or await its method open"
            )
        return self._opened

    def _open_data(
        self, data: DataSource, phase: str, batch_size: int
    ) -> tuple[Dataset, Iterator[dict[str, np.ndarray]]]:
        """Check the data, and return them with their batches."""
        dataset = open_whole(self.manifest, data, phase, batch_size, self._require_opened().kept)
        return dataset, dataset.batches(batch_size, seed=self._seed, epoch=0, shuffle=False)

    async def _predict(self, runner: AsyncTaskRunner, batch: Batch) -> dict[str, np.ndarray]:
        rate = choose_rate(self.manifest, None, self.steps)
        return select_outputs(self.manifest, await runner.perform(PREDICT, batch, rate))

    def _stop_stages(self) -> None:
        if self._engine is not None:
            self._engine.stop()


class _Opened:
    """What a client has once it is open; ``kept`` names what the model keeps itself."""

    def __init__(self, executor: Executor, run: TrainingRun, runner: AsyncTaskRunner) -> None:
        self.executor = executor
        self.run = run
        self.runner = runner
        self.kept = list_kept(executor.manifest)
