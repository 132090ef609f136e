"""The public client, which trains, evaluates and predicts together with a server.

:class:`Client` connects the data, the channel to the server, and the executor that runs the
client's part.  Without a server, the client trains an unsplit model.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Self

import numpy as np

from splitonnx.bundles import PartyBundle
from splitonnx.errors import UsageError
from splitonnx.manifests import PartyManifest
from splitonnx.micro_batches import enlarge
from splitonnx.names import EVALUATE, PREDICT, TRAIN
from splitonnx.pipelines import USUAL_IN_FLIGHT, choose_division
from splitonnx.runtime.channels.channels import Dial
from splitonnx.runtime.channels.credentials import Credentials
from splitonnx.runtime.channels.greetings import SharingTerms
from splitonnx.runtime.client.datasets import (
    Batch,
    Dataset,
    DataSource,
    check_batch,
    check_finite,
    join_outputs,
)
from splitonnx.runtime.client.histories import Evaluation, History, StepRecord
from splitonnx.runtime.client.metrics.choices import choose_metrics
from splitonnx.runtime.client.options import (
    FitOptions,
    LearningRate,
    check_client,
    choose_measures,
    fit_schedule,
    list_kept,
    open_run,
    open_whole,
    plan_joining,
    require_phase,
    require_positive,
)
from splitonnx.runtime.client.runners import TaskRunner, WhenUnsaved
from splitonnx.runtime.client.training_loops import TrainingLoop
from splitonnx.runtime.client.training_runs import TrainingRun
from splitonnx.runtime.engine.engines import Engine
from splitonnx.runtime.engine.executors import Executor
from splitonnx.runtime.engine.placements import Placement
from splitonnx.runtime.engine.providers import CPU
from splitonnx.runtime.wire.transports import Transport
from splitonnx.schedules import Schedule
from splitonnx.stopping import EarlyStopping

_ALREADY_TRAINING = "this client is already training"


class Client:
    """A client that trains and runs its part of a split model together with a server.

    A client can also train an unsplit model without a server.  If a connection breaks, the client
    reconnects (unless it was given an open transport), and training continues as if nothing had
    happened.  Use the client as a context manager, or call :meth:`close`.  If an error occurs
    during a task, the client is closed, and its state remains as it was before that task.

    Args:
        bundle: the client's folder, or the client's part if it is already loaded.
        server: a URL such as ``ws://127.0.0.1:8765``, a function that opens a transport, or an open
            transport; ``None`` for an unsplit model.
        credentials: how this client authenticates itself to the server, and which servers it
            trusts; allowed only if ``server`` is a URL.
        threads: number of threads per operator; by default, all cores are used.
        provider: what computes this part, such as ``cuda`` or ``openvino:GPU``; other than ``cpu``
            only for parts with the target ``portable`` (:attr:`placement`).
        seed: seed for shuffling and Dropout.
        resume: continue the interrupted run in the folder, if there is one.  The client starts with
            the run's state, and :meth:`fit` starts at the run's position in the data.
        give_up_after: number of seconds after which the client stops trying to connect or
            reconnect.  ``None`` means that it reconnects without a time limit, but makes only one
            attempt at its first connection (if ``resume`` is set, it retries until it succeeds).
        share: permit this part's trained weights and running statistics to be sent to the server,
            if it joins what its clients learn (:attr:`terms`).
        trusted: treat the bundle as trusted code.  Its graphs may then be in ORT format, which is
            not checked before ONNX Runtime loads it.

    Raises:
        BundleError, FormatError: the folder cannot be used.
        FolderInUse: ``resume`` is set, and another client is training in the folder.
        UsageError: the model is split but ``server`` is missing, the model is not split but
            ``server`` is given, or another argument is invalid.
        WrongRuntime: the installed ONNX Runtime does not have the provider, or cannot start it.
        ConnectionLost: the server cannot be reached.
        BundleMismatch, ServerBusy, SharingNotPermitted, RemoteFault: the server refuses the client.
    """

    def __init__(
        self,
        bundle: str | Path | PartyBundle,
        server: str | Transport | Dial | None = None,
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
        party = bundle if isinstance(bundle, PartyBundle) else PartyBundle.load(bundle)
        self._manifest = party.manifest
        check_client(self._manifest, has_server=server is not None, seed=seed)
        self._seed = seed
        self._engine = Engine(threads, provider=provider, trusted=trusted)
        self._executor = Executor(party, self._engine)
        self._kept = list_kept(party.manifest)
        self._run = TrainingRun.open(self._executor, resume=resume)
        with ExitStack() as undo:  # release the folder if no client is made
            undo.callback(self._run.release)
            channel = self._run.connect(
                self._executor,
                server,
                credentials,
                give_up_after=give_up_after,
                is_patient=resume or give_up_after is not None,
                can_share=share,
            )
            if channel is not None and channel.step != self._executor.step:
                self._run.position = self._run.go_back(self._executor, channel.step)
            undo.pop_all()
        self._runner = TaskRunner(self._executor, self._run, channel, seed=seed)
        self._loop = TrainingLoop(self._executor, self._runner, seed=seed)
        self._is_training = threading.Lock()  # held while a fit is running

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def manifest(self) -> PartyManifest:
        """Return the manifest of this part, which declares every tensor that the part sends."""
        return self._manifest

    @property
    def steps(self) -> int:
        """Return how many training steps this part has performed since the bundle was created."""
        return self._executor.step

    @property
    def terms(self) -> SharingTerms:
        """Return whether and how the server joins what its clients learn."""
        return self._runner.terms

    @property
    def placement(self) -> Placement | None:
        """Return what the provider left to the CPU, once it is known; ``None`` for ``cpu``."""
        return self._engine.describe_placement()

    @property
    def session(self) -> str:
        """Return the name of this client's session; the server uses the same name."""
        return self._run.session

    @property
    def checkpoints(self) -> tuple[int, ...]:
        """Return the steps at which this run has checkpoints, newest first."""
        return self._run.find_resume_point(self.steps).kept

    def fit(
        self,
        data: DataSource,
        *,
        epochs: int = 1,
        batch_size: int = 32,
        accumulate: int = 1,
        micro_batches: int = 1,
        in_flight: int = USUAL_IN_FLIGHT,
        eval_data: DataSource | None = None,
        metrics: Sequence[str] = (),
        learning_rate: LearningRate = None,
        schedule: Schedule | None = None,
        shuffle: bool = True,
        stopping: EarlyStopping | None = None,
        checkpoint_every: int | None = None,
        when_unsaved: WhenUnsaved = "stop",
        restart: bool = False,
        save: bool = False,
        on_start: Callable[[], None] | None = None,
        on_step: Callable[[StepRecord], None] | None = None,
        on_epoch: Callable[[Evaluation], None] | None = None,
    ) -> History:
        """Train for a number of epochs and return the history.

        A resumed client starts at the position in the data where its run was interrupted, and
        trains until all ``epochs`` are complete.  If the server lost steps, both sides return to
        the newest checkpoint that both have, or to the start of this call, and repeat the lost
        steps exactly.

        Args:
            data: the training data; see :func:`~splitonnx.runtime.client.datasets.open_dataset`.
            epochs: number of passes over the data.
            batch_size: number of samples per step.  If the model's batch is fixed, it must be
                that number, and a smaller last batch is skipped.  Ignored if the data are already
                divided into batches.
            accumulate: number of micro-batches that each step's batch is divided into.  Their
                gradients are added up and applied once, so a step needs less memory.
            micro_batches: the same, with at most ``in_flight`` of them unfinished at a time, so
                that client, network and server work at once.
            in_flight: from 1 to 16; more of them need more memory and hide a slower network.
            eval_data: the data on which the model is evaluated after each epoch.
            metrics: what else an evaluation computes; see :meth:`evaluate`.
            learning_rate: a number, or a function of the number of steps so far; by default, the
                optimizer's own learning rate.
            schedule: multiplies the learning rate in each step; see :mod:`splitonnx.schedules`.
            shuffle: use a different random order of the data in each epoch.
            stopping: return to the best evaluation's state; see :mod:`splitonnx.stopping`.
            checkpoint_every: number of steps between checkpoints, which both sides write to their
                folders; by default, no checkpoints are written.
            when_unsaved: if a checkpoint cannot be written, ``"stop"`` or ``"continue"``.
            restart: discard an interrupted run in the folder.
            save: call :meth:`save` at the end; steps that the server lost are repeated first.
            on_start: a function that is called once, after all checks and before the first step.
            on_step: a function that is called with the record of each step.
            on_epoch: a function that is called with the record of each evaluation.

        Raises:
            DataError: the data do not fit the model, the data contain NaN or infinity, or a loss is
                not finite.
            StageFailed: a stage cannot be loaded or run.
            UnfinishedRun: the folder contains an interrupted run; resume it, or use ``restart``.
            FolderInUse: another client is training in the folder.
            UsageError: a number is out of range; another call of this method is still running; or
                the resumed run started with a different seed, batch size, shuffling, number of
                samples, schedule or early stopping.
            NotSaved: a checkpoint or the trained state cannot be saved.
            StepsLost: the server lost steps of an earlier training, or repeatedly
                lost the same steps.
            ConnectionLost, RemoteFault: the connection was lost, or the server reported an internal
                error.
        """
        require_positive(epochs=epochs, batch_size=batch_size, checkpoint_every=checkpoint_every)
        specs = require_phase(self._manifest, TRAIN).data
        division = self._runner.divide(choose_division(accumulate, micro_batches, in_flight))
        sizes = (batch_size, division.count)
        training, held_out = open_run(self._manifest, (data, eval_data), sizes, self._kept)
        rates = fit_schedule(
            schedule, learning_rate, training, specs, epochs=epochs, batch_size=batch_size
        )
        options = FitOptions(
            training=training,
            held_out=held_out,
            metrics=choose_measures(
                self._manifest,
                metrics,
                stopping,
                has_data=held_out is not None,
                can_return=self._runner.can_return,
            ),
            epochs=epochs,
            learning_rate=learning_rate,
            rates=rates,
            stopping=stopping,
            checkpoint_every=checkpoint_every,
            when_unsaved=when_unsaved,
            save=save,
            on_step=on_step,
            on_epoch=on_epoch,
        )
        start = options.find_start(sizes, seed=self._seed, shuffle=shuffle)
        with self._training():
            if save:
                self._run.hold()  # fail now rather than after training
            if checkpoint_every is not None or stopping is not None:
                self._run.begin_run(restart=restart)
            self._runner.prepare_training(division.count)
            if on_start is not None:
                on_start()
            return self._loop.fit(options, self._run.take_position(start))

    @contextmanager
    def _training(self) -> Iterator[None]:
        """Refuse a second fit at the same time, and release the folder if the fit fails."""
        if not self._is_training.acquire(blocking=False):
            raise UsageError(_ALREADY_TRAINING)
        try:
            with ExitStack() as undo:
                undo.callback(self._run.release)  # another client can resume before close
                yield
                undo.pop_all()
        finally:
            self._is_training.release()

    def step(
        self,
        batch: Batch,
        *,
        learning_rate: LearningRate = None,
        accumulate: int = 1,
        micro_batches: int = 1,
        in_flight: int = USUAL_IN_FLIGHT,
    ) -> dict[str, np.ndarray]:
        """Perform one training step on a batch, and return the step's results, ``loss`` first.

        The last three arguments divide the batch as in :meth:`fit`.

        Raises:
            UsageError: a call to :meth:`fit` is still running, or the step cannot be divided.
            DataError, StageFailed, ConnectionLost, RemoteFault: see :meth:`fit`.
        """
        specs = require_phase(self._manifest, TRAIN).data
        division = self._runner.divide(choose_division(accumulate, micro_batches, in_flight))
        check_batch(batch, enlarge(specs, division.count), self._kept)
        check_finite(batch, "")
        if self._is_training.locked():
            raise UsageError(_ALREADY_TRAINING)
        return self._loop.step(batch, learning_rate, division.count)

    def evaluate(
        self, data: DataSource, *, batch_size: int = 32, metrics: Sequence[str] = ()
    ) -> dict[str, float]:
        """Evaluate the model on the data, and return the mean of each result over all samples.

        ``metrics`` names what else is computed, such as ``f1``; a metric that the data do not
        define is NaN.  :data:`~splitonnx.runtime.client.metrics.choices.METRICS` lists the names.

        Raises:
            UsageError: the bundle has no evaluation phase, or a metric does not fit it.
            DataError, StageFailed, ConnectionLost, RemoteFault: see :meth:`fit`.
        """
        require_positive(batch_size=batch_size)
        dataset = open_whole(self._manifest, data, EVALUATE, batch_size, self._kept)
        return self._loop.evaluate(dataset, batch_size, choose_metrics(metrics, self._manifest))

    def predict(self, data: DataSource, *, batch_size: int = 32) -> dict[str, np.ndarray]:
        """Run the model on the data and return its outputs, joined along the axis of the samples.

        An output that is a single number per batch has one number for each batch.

        Raises:
            UsageError: there are several batches, and an output has no axis for the samples or
                more than one, or differs in another dimension, too; use :meth:`predict_batches`.
            DataError, StageFailed, ConnectionLost, RemoteFault: see :meth:`fit`.
        """
        dataset, batches = self._open_predicting(data, batch_size)
        joinable, axes = plan_joining(self._manifest, dataset, batches)
        return join_outputs((self._loop.predict(batch) for batch in joinable), axes)

    def predict_batches(
        self, data: DataSource, *, batch_size: int = 32
    ) -> Iterator[dict[str, np.ndarray]]:
        """Check the data, and return an iterator that yields the outputs of each batch in order.

        Raises:
            DataError, StageFailed, ConnectionLost, RemoteFault: see :meth:`fit`.
        """
        return map(self._loop.predict, self._open_predicting(data, batch_size)[1])

    def _open_predicting(
        self, data: DataSource, batch_size: int
    ) -> tuple[Dataset, Iterator[dict[str, np.ndarray]]]:
        """Check the data of a prediction, and return them with their batches."""
        require_positive(batch_size=batch_size)
        dataset = open_whole(self._manifest, data, PREDICT, batch_size, self._kept)
        return dataset, dataset.batches(batch_size, seed=self._seed, epoch=0, shuffle=False)

    def state(self) -> dict[str, np.ndarray]:
        """Return the state of this part as read-only arrays, including the optimizer's state."""
        return self._executor.state()

    def save(self) -> None:
        """Write the trained state to the bundle folders, first on the server, then on the client.

        Raises:
            BundleError: the bundle exists only in memory, or the folder cannot be written.
            NotSaved: the server could not save its state, or the client's state contains NaN or
                infinity.
            FolderInUse: another client is training in the folder.
            StepsLost: the server lost steps, and both sides went back to an earlier step; calling
                :meth:`fit` with ``save`` repeats the lost steps.
            ConnectionLost, RemoteFault: see :meth:`fit`.
        """
        with ExitStack() as undo:
            undo.callback(self._release_unless_training)
            self._runner.publish()
            undo.pop_all()

    def _release_unless_training(self) -> None:
        if not self._is_training.locked():  # the running fit holds the folder
            self._run.release()

    def close(self) -> None:
        """End the session and close the connection; may be called twice."""
        self._runner.close()
