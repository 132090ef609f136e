"""The executor, which keeps a party's state and runs the party's tasks.

The executor passes each stage its inputs: state, input data, scalars, results of earlier stages and
tensors from the other party.  When a task is finished, its changes to the state are committed
atomically.  The executor does no network communication: the caller sends and receives the tensors.
Nothing in it is specific to neural networks.  Between stages, tensors stay in ONNX Runtime's
memory.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from copy import copy
from functools import partial
from weakref import WeakSet

import numpy as np

from splitonnx.bundles import PartyBundle
from splitonnx.errors import (
    LocalProtocolError,
    MissingArray,
    NotFinite,
    RemoteProtocolError,
    StageFailed,
    StageStopped,
    StageTooSlow,
    quote,
)
from splitonnx.faults import attribute_errors_to_us
from splitonnx.manifests import WireKind
from splitonnx.messages import TaskKey
from splitonnx.names import (
    ACCUMULATE,
    EVALUATE,
    LOSS,
    PREDICT,
    STEP_PHASES,
    TRAIN,
    TRAINING,
    UPDATE,
    WEIGH,
)
from splitonnx.runtime.engine.dataflows import Dataflow, list_early, list_steady, list_sums
from splitonnx.runtime.engine.engines import Engine, LoadedStage, Tensor
from splitonnx.runtime.engine.providers import check_target
from splitonnx.runtime.engine.steps import OpenStep, OpenTask, RunningStage, make_scalars
from splitonnx.runtime.storage.outcomes import check_outcome, publish_state
from splitonnx.runtime.wire.validation import check_finite, check_norm
from splitonnx.tensors import check_array


class Executor:
    """An executor that runs one party's stages in this process and keeps the party's state.

    ``step`` is the number of training steps committed so far.  Several tasks may be open at the
    same time; they share the state.  Those of one step of several micro-batches are begun and
    finished in the order of their numbers; each reads what the one before it changed, so that the
    result does not depend on which stages run first (see :class:`~steps.OpenStep`).  Two threads
    must not use an executor at the same time.

    ``norm`` is the largest L2 norm allowed for a gradient that this party decodes; ``None`` means
    no limit.  With ``renews``, what a step computes once for all its micro-batches is computed
    right after the update before it, for a party that waits then.
    """

    def __init__(
        self,
        party: PartyBundle,
        engine: Engine,
        *,
        norm: float | None = None,
        renews: bool = False,
    ) -> None:
        check_target(engine.provider, party.manifest.party, party.manifest.target)
        self.step = party.step
        self._norm = norm
        self._renews = renews
        self._divided: WeakSet[Executor] = WeakSet()  # the forks that share what stages keep
        self.manifest = party.manifest
        self.party = party
        self._engine = engine
        self._state = {name: engine.from_array(a) for name, a in party.state().items()}
        self._flows: dict[str, Dataflow] = {}
        self._loaded: dict[tuple[str, str], LoadedStage] = {}
        self._shared: dict[tuple[object, ...], LoadedStage] = {}  # phases share files
        self._open = OpenStep(party.manifest, engine)
        self._tasks: dict[TaskKey, OpenTask] = {}

    def fork(self) -> Executor:
        """Return an independent executor with the same state and no open tasks.

        The two share the loaded stages, and each tensor of the state until one of them replaces it.
        They may run in different threads, but :meth:`prepare` may not: call it before the fork.
        """
        twin = copy(self)
        twin._state = dict(self._state)
        twin._open = self._open.start_anew()
        twin._tasks = {}
        return twin

    @property
    def nbytes(self) -> int:
        """Return the size of the state in bytes."""
        return sum(array.nbytes for array in self.state().values())

    def prepare(self, phase: str) -> None:
        """Load the stages of a phase now, instead of when its first task begins.

        Raises:
            ForbiddenGraph, WrongRuntime, StageFailed: see :meth:`Engine.load`.
        """
        if phase in self._flows:
            return
        declared = self.manifest.phase(phase)
        training = self.manifest.target == TRAINING and phase not in (PREDICT, EVALUATE, WEIGH)
        for stage in declared.stages:
            steady = list_steady(declared, stage)
            sums = list_sums(self.manifest, declared, stage)
            early = list_early(declared, stage, self.manifest.party)
            shared = (stage.graph, training, steady, tuple(sums.items()), early)
            if shared not in self._shared:
                graph = self.party.graphs[stage.graph]
                self._shared[shared] = self._engine.load(
                    stage.name, graph, training=training, steady=steady, sums=sums, early=early
                )
            self._loaded[phase, stage.name] = self._shared[shared].choose(stage.outputs)
        self._flows[phase] = Dataflow(declared, self.manifest.party)

    def begin(
        self, key: TaskKey, *, data: Mapping[str, np.ndarray], seed: int, learning_rate: float
    ) -> None:
        """Open a task with this party's data.

        Arrays in ``data`` that the phase does not declare are ignored.  ``seed`` determines the
        random numbers of this task (such as Dropout masks), and ``learning_rate`` is the learning
        rate of this step.  Do not change the arrays until the task is over.

        Raises:
            MissingArray, ArrayMismatch, ValueOutOfRange: the data do not fit the phase.
            LocalProtocolError: the task is already open, or is not the next of its step.
            UsageError: the seed or the learning rate is out of range for its tensor.
            ForbiddenGraph, WrongRuntime, StageFailed: as raised by :meth:`prepare`.
        """
        if key in self._tasks:
            raise LocalProtocolError(f"{key} is open already")
        self._open.check_next(key, self.step)
        scalars = make_scalars(key, seed, learning_rate)
        self.prepare(key.phase)
        flow = self._flows[key.phase]
        phase = self.manifest.phase(key.phase)
        task = OpenTask(key=key, phase=phase, flow=flow, progress=flow.start())
        for spec in phase.data:
            if spec.name not in data:
                raise MissingArray(spec.name, tuple(data))
            check_array(data[spec.name], spec, task.sizes)
        self._open.begin(key)
        if key.phase == ACCUMULATE:
            self._divided.add(self)
        self._supply(task, {spec.name: data[spec.name] for spec in phase.data})
        self._supply(task, scalars)
        self._tasks[key] = task

    def deliver(self, key: TaskKey, tensors: Mapping[str, np.ndarray]) -> None:
        """Pass tensors from the other party to an open task.

        Raises:
            RemoteProtocolError: the task does not expect a tensor of that name, or has already
                received it.
            ArrayMismatch, ValueOutOfRange: a tensor does not match its declaration in the manifest.
        """
        task = self._task(key)
        if unexpected := tensors.keys() - task.progress.missing:
            raise RemoteProtocolError(f"it sent {quote(sorted(unexpected))}, not expected now")
        task.check_wires(tensors)
        self._supply(task, tensors)

    def advance(self, key: TaskKey) -> Iterator[dict[str, np.ndarray]]:
        """Run all stages whose inputs are available; after each, yield the tensors to send.

        Each yielded dictionary maps the tensors' names to read-only arrays.  The first one also
        contains those of this party's input arrays that are sent to the other party unchanged.  A
        stage that reads what an earlier task of the step has not changed yet does not run: call
        this method again when that task has run, or is finished if this one is the update.  If this
        method raises an error, abandon the task.

        Raises:
            StageFailed, StageTooSlow, StageStopped: see :meth:`Engine.run`.
            InternalRuntimeError: a bug in the code that runs the stages.
            NotFinite: the training loss, or what was decoded to train with, is NaN or infinite;
                nothing that depends on it is sent.
            NormTooLarge: the norm of a decoded gradient is too large.
            ArrayMismatch: what was decoded does not have the declared shape.
        """
        task = self._task(key)
        while (running := task.running or self._start(task)) is not None:
            with attribute_errors_to_us(f"stage '{running.stage.name}'"):
                self._run(task, running)
            if wires := task.progress.next_wires():
                yield self._collect_wires(task, wires)
        if wires := task.progress.next_wires():  # data alone: no stage was ready
            yield self._collect_wires(task, wires)

    def is_waiting(self, key: TaskKey) -> bool:
        """Return whether an open task has a stage that needs nothing but :meth:`advance`.

        After that method, such a stage waits for an earlier task of the step.
        """
        return self._task(key).progress.has_all_values

    def is_finished(self, key: TaskKey) -> bool:
        """Return whether a task is ready for :meth:`finish`.

        A task is ready once every stage has run, every expected tensor has arrived, and every
        outgoing tensor has been yielded.
        """
        return self._task(key).is_finished

    def results(self, key: TaskKey) -> dict[str, np.ndarray]:
        """Return the results of a finished task, without committing its changes to the state."""
        task = self._task(key)
        if not task.is_finished:
            raise LocalProtocolError(f"{key} is not finished")
        return {name: self._engine.to_array(task.values[name]) for name in task.phase.results}

    def finish(self, key: TaskKey) -> dict[str, np.ndarray]:
        """Commit a finished task's changes to the state, close the task and return its results.

        The state changes atomically.  A task of the phase ``train`` counts as one step.  A task of
        the phase ``accumulate`` changes the state only with the task of the phase ``update`` that
        ends its step.

        Raises:
            LocalProtocolError: the task is not finished, or one before it in its step is not.
        """
        results = self.results(key)
        self._open.check_end(key)
        task = self._tasks.pop(key)
        if key.phase == ACCUMULATE:
            self._open.end(key)
            return results
        changes = {name: task.values[v] for name, v in task.phase.commits.items()}
        if key.phase == UPDATE:
            changes = {**self._open.close(), **changes}
        self._state.update(changes)
        self.step += key.phase in (TRAIN, UPDATE)
        if key.phase == UPDATE and self._renews:
            self._renew()
        return results

    def abandon(self, key: TaskKey) -> None:
        """Abort a task and discard its changes to the state; do nothing if it is not open.

        Of a step of several micro-batches, whose tasks need not be open, the whole step is aborted,
        with all its tasks.
        """
        self._tasks.pop(key, None)
        if key.phase in (ACCUMULATE, UPDATE) and key.step == self.step:
            self._open.reset()
            self._tasks = {
                k: t for k, t in self._tasks.items() if k.phase not in (ACCUMULATE, UPDATE)
            }

    def state(self) -> dict[str, np.ndarray]:
        """Return all tensors of the state, including those of the optimizer, as read-only arrays.

        Later updates do not change these arrays.  Their shapes and dtypes are those in the
        manifest.
        """
        return {name: self._engine.to_array(tensor) for name, tensor in self._state.items()}

    def restore(self, tensors: Mapping[str, np.ndarray], step: int) -> None:
        """Replace the state and the number of committed steps, and abort open tasks.

        ``tensors`` must contain every tensor of the state that the manifest declares; any others
        are ignored.  ``step`` is the number of training steps that led to this state.  Do not
        change the arrays afterwards.
        """
        self._tasks.clear()
        self._open.reset()
        self._state = {name: self._engine.from_array(tensors[name]) for name in self._state}
        self.step = step

    def check_outcome(self) -> None:
        """Check that the state can be published, without writing anything.

        Publishing may still fail, for example if the disk is full.

        Raises:
            BundleError, StateNotFinite, NotSaved: as raised by :meth:`publish`.
        """
        check_outcome(self.party, self.state())

    def publish(self, *, session: str = "", position: str = "", owner: str = "") -> None:
        """Write the state to the party's folder as the outcome of training.

        The outcome is written atomically.  ``session`` is the session that trained the state, and
        ``owner`` is the session's owner.  ``position`` is the position in the data at which
        training stopped.

        Raises:
            BundleError: the bundle exists only in memory, or the folder cannot be written.
            StateNotFinite: the state contains NaN or infinity.
            NotSaved: the folder was deleted or replaced after it was loaded.
        """
        publish_state(
            self.party, self.state(), step=self.step,
            session=session, position=position, owner=owner,
        )  # fmt: skip

    @property
    def is_lost(self) -> bool:
        """Return ``False``, because a state in this process cannot be lost."""
        return False

    def close(self) -> None:
        """Do nothing, because an executor in this process has nothing to release."""

    def _task(self, key: TaskKey) -> OpenTask:
        if key not in self._tasks:
            raise LocalProtocolError(f"{key} is not open")
        return self._tasks[key]

    def _supply(self, task: OpenTask, arrays: Mapping[str, np.ndarray]) -> None:
        self._keep(task, {name: self._engine.from_array(a) for name, a in arrays.items()})

    def _keep(self, task: OpenTask, tensors: Mapping[str, Tensor]) -> None:
        task.keep(tensors)
        self._open.add(task.key, tensors)

    def _start(self, task: OpenTask) -> RunningStage | None:
        """Begin the next stage whose inputs are there, if there is one."""
        stage = task.progress.next_stage(partial(self._open.is_ready, task.key))
        if stage is None:
            return None
        loaded = self._loaded[task.phase.name, stage.name]
        feeds = task.feed(stage, partial(self._open.find, self._state, task.key, loaded.zeros))
        task.running = RunningStage(stage=stage, part=loaded, feeds=feeds)
        return task.running

    def _run(self, task: OpenTask, running: RunningStage) -> None:
        """Run the next part of a stage that has begun."""
        part, stage = running.part, running.stage
        outputs = self._engine.run(part, running.feeds)
        self._take(task, {n: t for n, t in outputs.items() if n in stage.outputs})
        if part.then is not None:
            running.feeds |= {name: outputs[name] for name in part.handed}
            running.part = part.then
            return
        task.running = None
        self._open.note_run(task.key, stage)
        self._drop(task, task.flow.needs[stage.name])

    def _take(self, task: OpenTask, outputs: Mapping[str, Tensor]) -> None:
        """Check what a stage has computed, and keep it."""
        if task.phase.name in STEP_PHASES and LOSS in outputs:
            loss = self._engine.to_array(outputs[LOSS])
            if not np.isfinite(loss).all():
                raise NotFinite(LOSS, f"{loss} at step {self.step + 1}")
        self._check_decoded(task, outputs)
        self._keep(task, outputs)

    def _check_decoded(self, task: OpenTask, outputs: Mapping[str, Tensor]) -> None:
        """Check what a stage decoded as a received tensor that was not encoded is checked."""
        for encoded in task.phase.list_encoded():
            name = encoded.tensor.name
            if encoded.receiver != self.manifest.party or name not in outputs:
                continue
            array = self._engine.to_array(outputs[name])
            check_array(array, encoded.tensor, task.sizes)
            if task.phase.name in STEP_PHASES:
                check_finite(name, array, f"step {self.step + 1}")
                if self._norm is not None and encoded.kind is WireKind.GRADIENT:
                    check_norm(name, array, self._norm)

    def _renew(self) -> None:
        """Compute what the next step computes once, unless another fork's step may be the next."""
        if len(self._divided) > 1:
            return
        for (phase, _), stage in self._loaded.items():
            if phase == ACCUMULATE:
                with suppress(StageFailed, StageTooSlow, StageStopped):  # the next step says so
                    self._engine.renew(stage, self._state)

    def _collect_wires(self, task: OpenTask, wires: tuple[str, ...]) -> dict[str, np.ndarray]:
        """Return outgoing tensors as arrays, and record the sizes that replies must have."""
        arrays = {name: self._engine.to_array(task.values[name]) for name in wires}
        task.check_wires(arrays)
        self._drop(task, wires)
        return arrays

    def _drop(self, task: OpenTask, names: Iterable[str]) -> None:
        for name in task.progress.release(names):
            del task.values[name]
