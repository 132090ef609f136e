"""The client: trains, evaluates and predicts with its part of a model and a server's.

It brings together data, the executor and the connection; it knows the phases by name and nothing
of what the stages compute.  A model left whole is trained by the same loop without a server.
"""

from __future__ import annotations

import itertools
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import Self, TypeAlias, TypeVar

import msgspec
import numpy as np

from splitonnx.bundles import PartyBundle
from splitonnx.errors import (
    BundleMismatch,
    LocalProtocolError,
    NotFinite,
    ProtocolError,
    RemoteFault,
    RemoteProtocolError,
    ServerBusy,
    SplitonnxError,
    UsageError,
)
from splitonnx.manifests import PartyManifest, Phase
from splitonnx.messages import (
    PROTOCOL,
    Bye,
    Fault,
    Hello,
    Message,
    Save,
    Saved,
    TaskKey,
    Tensors,
    Welcome,
)
from splitonnx.runtime.datasets import (
    Batch,
    Dataset,
    DataSource,
    check_batch,
    check_finite,
    open_dataset,
)
from splitonnx.runtime.engines import Engine
from splitonnx.runtime.executors import EVALUATE, LOSS, PREDICT, TRAIN, Executor
from splitonnx.runtime.histories import Evaluation, History, StepRecord
from splitonnx.runtime.protocols import Protocol, list_wires
from splitonnx.runtime.sockets import connect
from splitonnx.runtime.transports import Transport
from splitonnx.tensors import TensorSpec

LearningRate: TypeAlias = float | Callable[[int], float] | None
"""A constant, or a function of the updates so far; ``None`` is the optimizer's own."""


class Client:
    """Trains and runs a bundle's client part against a server, or a model left whole without one.

    ``bundle`` is the client's folder, or the loaded part.  ``server`` is a URL such as
    ``ws://127.0.0.1:8765`` or an open transport; ``None`` for a model left whole.  ``threads``
    limits the threads of one operator; ``seed`` decides shuffling and Dropout.  Use it as a
    context manager, or call :meth:`close`.  After an error in the middle of a task the two sides
    may stand apart: the client then closes, and its own state is what it was before the task.

    Raises:
        BundleError, FormatError: the folder cannot be used.
        UsageError: a server is missing, or given where there is nothing for it to do; the seed is
            negative.
        ConnectionLost: the server cannot be reached.
        BundleMismatch, ServerBusy, RemoteFault: the server refuses.
    """

    def __init__(
        self,
        bundle: str | Path | PartyBundle,
        server: str | Transport | None = None,
        *,
        threads: int | None = None,
        seed: int = 0,
    ) -> None:
        party = bundle if isinstance(bundle, PartyBundle) else PartyBundle.load(bundle)
        self._manifest = party.manifest
        if seed < 0:
            raise UsageError(f"the seed must not be negative, not {seed}")
        self._seed = seed
        self._closed = False
        self._others = itertools.count()  # numbers the tasks that are no training step
        if (server is not None) != any(phase.wires for phase in self._manifest.phases):
            raise UsageError(
                "this model was left whole and has no part for a server"
                if server is not None
                else "this bundle is one part of a model; name the server that holds the other"
            )
        self._executor = Executor(party, Engine(threads))
        self._link = None if server is None else _Link(server, self._manifest, self._executor.step)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def steps(self) -> int:
        """Updates that this part has seen in its life."""
        return self._executor.step

    def fit(
        self,
        data: DataSource,
        *,
        epochs: int = 1,
        batch_size: int = 32,
        eval_data: DataSource | None = None,
        learning_rate: LearningRate = None,
        shuffle: bool = True,
        on_step: Callable[[StepRecord], None] | None = None,
        on_epoch: Callable[[Evaluation], None] | None = None,
    ) -> History:
        """Train for some epochs and return what happened.

        ``data`` and ``eval_data`` are as :func:`~splitonnx.runtime.datasets.open_dataset` takes
        them; with ``eval_data`` each epoch ends with an evaluation.  A smaller last batch is left
        out where the model's batch size is fixed.  ``on_step`` and ``on_epoch`` are called with
        each record.

        Raises:
            DataError: the data do not fit, or hold NaN; a loss is not finite.
            StageFailed: a stage cannot be loaded or run.
            ConnectionLost, RemoteFault: the server went, or reported an error of its own.
        """
        _require_positive(epochs=epochs, batch_size=batch_size)
        phase = self._phase(TRAIN)
        training = open_dataset(data)
        training.check(phase.data)
        held_out = None if eval_data is None else open_dataset(eval_data)
        if held_out is not None:
            held_out.check(self._evaluation_data())
        self._executor.prepare(TRAIN)
        fixed = any(isinstance(dim, int) for spec in phase.data for dim in spec.shape[:1])
        history = History()
        for epoch in range(epochs):
            batches = training.batches(
                batch_size, seed=self._seed, epoch=epoch, shuffle=shuffle, drop_last=fixed
            )
            for batch in batches:
                record = self._record_step(batch, epoch, learning_rate)
                history.steps.append(record)
                if on_step is not None:
                    on_step(record)
            if held_out is not None:
                evaluation = self._record_evaluation(held_out, batch_size, epoch)
                history.evaluations.append(evaluation)
                if on_epoch is not None:
                    on_epoch(evaluation)
        return history

    def step(self, batch: Batch, *, learning_rate: LearningRate = None) -> dict[str, np.ndarray]:
        """Take one optimizer step on one batch and return the phase's results, ``loss`` first.

        Raises:
            DataError, StageFailed, ConnectionLost, RemoteFault: see :meth:`fit`.
        """
        check_batch(batch, self._phase(TRAIN).data)
        check_finite(batch, "")
        return self._perform(TRAIN, batch, learning_rate)

    def evaluate(self, data: DataSource, *, batch_size: int = 32) -> dict[str, float]:
        """Predict, compare with the labels, and return each metric's mean over all samples.

        Raises:
            UsageError: the bundle has nothing to evaluate with.
            DataError, StageFailed, ConnectionLost, RemoteFault: see :meth:`fit`.
        """
        _require_positive(batch_size=batch_size)
        dataset = open_dataset(data)
        dataset.check(self._evaluation_data())
        return self._evaluate(dataset, batch_size)

    def predict(self, data: DataSource, *, batch_size: int = 32) -> dict[str, np.ndarray]:
        """Run the model and return its outputs, the samples along the first dimension.

        Raises:
            DataError, StageFailed, ConnectionLost, RemoteFault: see :meth:`fit`.
        """
        _require_positive(batch_size=batch_size)
        dataset = open_dataset(data)
        dataset.check(self._phase(PREDICT).data)
        parts: dict[str, list[np.ndarray]] = defaultdict(list)
        for batch in dataset.batches(batch_size, seed=self._seed, epoch=0, shuffle=False):
            for name, array in self._perform(PREDICT, batch).items():
                parts[name].append(array)
        return {name: np.concatenate(arrays) for name, arrays in parts.items()}

    def state(self) -> dict[str, np.ndarray]:
        """Return this part's state, optimizer's included, as read-only arrays."""
        return self._executor.state()

    def save(self) -> None:
        """Write the state into the party's folder, the server's first and then this part's own.

        Raises:
            BundleError: the bundle is in memory only, or the folder cannot be written.
            ConnectionLost, RemoteFault: the server went, or could not save.
        """
        if self._link is not None:
            self._require_open()
            self._link.save(self._executor.step)
        self._executor.save()

    def close(self) -> None:
        """Say good-bye to the server; may be called twice."""
        if not self._closed and self._link is not None:
            self._link.close()
        self._closed = True

    def _phase(self, name: str) -> Phase:
        phase = self._manifest.phase(name)
        if not (phase.stages or phase.wires):
            raise UsageError(f"this bundle has nothing to {name} with")
        return phase

    def _require_open(self) -> None:
        if self._closed:
            raise LocalProtocolError("the client is closed")

    def _evaluation_data(self) -> list[TensorSpec]:
        predicted = self._phase(PREDICT)
        measured = [s for s in self._phase(EVALUATE).data if s.name not in predicted.results]
        return [*predicted.data, *measured]

    def _record_step(self, batch: Batch, epoch: int, learning_rate: LearningRate) -> StepRecord:
        up, down = self._traffic()
        start = time.perf_counter()
        results = self._perform(TRAIN, batch, learning_rate)
        seconds = time.perf_counter() - start
        sent, received = self._traffic()
        metrics = {name: float(array) for name, array in results.items() if array.ndim == 0}
        return StepRecord(
            step=self._executor.step,
            epoch=epoch,
            loss=metrics.pop(LOSS),
            metrics=metrics,
            samples=self._count(TRAIN, batch),
            seconds=seconds,
            bytes_up=sent - up,
            bytes_down=received - down,
        )

    def _record_evaluation(self, dataset: Dataset, batch_size: int, epoch: int) -> Evaluation:
        start = time.perf_counter()
        metrics = self._evaluate(dataset, batch_size)
        return Evaluation(epoch=epoch, metrics=metrics, seconds=time.perf_counter() - start)

    def _evaluate(self, dataset: Dataset, batch_size: int) -> dict[str, float]:
        totals: dict[str, float] = defaultdict(float)
        samples = 0
        for batch in dataset.batches(batch_size, seed=self._seed, epoch=0, shuffle=False):
            outputs = self._perform(PREDICT, batch)
            size = self._count(PREDICT, batch)
            for name, value in self._perform(EVALUATE, {**batch, **outputs}).items():
                totals[name] += float(value) * size
            samples += size
        return {name: total / samples for name, total in totals.items()}

    def _count(self, phase: str, batch: Batch) -> int:
        return len(batch[self._manifest.phase(phase).data[0].name])

    def _traffic(self) -> tuple[int, int]:
        return (0, 0) if self._link is None else self._link.traffic

    def _perform(
        self, phase: str, data: Batch, learning_rate: LearningRate = None
    ) -> dict[str, np.ndarray]:
        """Carry one task through, from its data to its commit."""
        self._require_open()
        step = self._executor.step
        rate = learning_rate(step) if callable(learning_rate) else learning_rate
        rate = self._manifest.learning_rate if rate is None else float(rate)
        session = "" if self._link is None else self._link.session
        number = step if phase == TRAIN else next(self._others)
        key = TaskKey(session=session, phase=phase, step=number, micro_batch=0)
        self._executor.begin(key, data=data, seed=self._seed, learning_rate=rate)
        with ExitStack() as on_failure:
            on_failure.callback(self.close)
            on_failure.callback(self._executor.abandon, key)
            self._exchange(key, rate)
            results = self._executor.finish(key)
            on_failure.pop_all()
        return results

    def _exchange(self, key: TaskKey, learning_rate: float) -> None:
        while True:
            for wires in self._executor.advance(key):
                self._remote().send_wires(key, wires, self._seed, learning_rate)
            if self._executor.is_finished(key):
                return
            self._executor.deliver(key, self._remote().receive_wires(key))

    def _remote(self) -> _Link:
        if self._link is None:
            raise LocalProtocolError("a stage waits for a value that no other stage gives")
        return self._link


_Answer = TypeVar("_Answer", Welcome, Tensors, Saved)


class _Link:
    """The conversation with the server, from the hello to the good-bye."""

    def __init__(self, server: str | Transport, manifest: PartyManifest, step: int) -> None:
        self._transport = connect(server) if isinstance(server, str) else server
        self._protocol = Protocol(manifest, manifest.party)
        with ExitStack() as on_failure:
            on_failure.callback(self._transport.close)
            self.session = self._greet(manifest, step)
            on_failure.pop_all()

    @property
    def traffic(self) -> tuple[int, int]:
        """Bytes sent and received so far."""
        return self._transport.bytes_sent, self._transport.bytes_received

    def send_wires(
        self, key: TaskKey, wires: Mapping[str, np.ndarray], seed: int, learning_rate: float
    ) -> None:
        key_fields = msgspec.structs.asdict(key)
        self._send(Tensors(**key_fields, seed=seed, learning_rate=learning_rate), wires)

    def receive_wires(self, key: TaskKey) -> Mapping[str, np.ndarray]:
        message, tensors = self._receive(Tensors)
        if message.key != key:
            raise RemoteProtocolError(f"it answered {message.key}, open is {key}")
        return tensors

    def save(self, step: int) -> None:
        self._send(Save(session=self.session, step=step))
        self._receive(Saved)

    def close(self) -> None:
        with suppress(ProtocolError):  # the other side may be gone already
            self._send(Bye())
        self._transport.close()

    def _greet(self, manifest: PartyManifest, step: int) -> str:
        wires = list_wires(manifest)
        self._send(Hello(protocol=PROTOCOL, digest=manifest.digest, step=step, wires=wires))
        welcome, _ = self._receive(Welcome)  # the protocol compares digest and wires
        if welcome.step != step:
            raise BundleMismatch("the number of steps trained", str(step), str(welcome.step))
        return welcome.session

    def _send(self, message: Message, tensors: Mapping[str, np.ndarray] | None = None) -> None:
        self._transport.send(self._protocol.send(message, tensors))

    def _receive(self, expected: type[_Answer]) -> tuple[_Answer, Mapping[str, np.ndarray]]:
        message, tensors = self._protocol.receive(self._transport.receive())
        if isinstance(message, Fault):
            raise _translate(message)
        if not isinstance(message, expected):
            raise RemoteProtocolError(
                f"it sent {type(message).__name__} where {expected.__name__} was due"
            )
        return message, tensors


def _translate(fault: Fault) -> SplitonnxError:
    if fault.code == ServerBusy.__name__:
        return ServerBusy()
    if fault.code == NotFinite.__name__:
        return NotFinite("loss", "at the server")
    return RemoteFault(fault.code, fault.reason)


def _require_positive(**counts: int) -> None:
    for name, count in counts.items():
        if count < 1:
            raise UsageError(f"{name} must be at least 1, not {count}")
