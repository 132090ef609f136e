"""Policies under which all clients train one model on the server, and rounds join their parts.

The server's model is one for all sessions, and its version counts the steps of all of them.  A
closed round is recorded with the model's whole state.  After a failure, the model goes back to the
newest record, and each client to the step at which it received that round's tensors.  If the steps
are joint and a client lost that step as well, all go back to the record before.  Otherwise, if a
client alone goes back, the model keeps what it learned from the steps that the client repeats.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Protocol

import numpy as np

from splitonnx.errors import ForeignSession, RemoteProtocolError, WorkerLost
from splitonnx.manifests import PartyManifest
from splitonnx.messages import Hello, Save, TaskKey
from splitonnx.names import SHARE, STEP_PHASES
from splitonnx.runtime.server.policies.joining.coordinators import Coordinator
from splitonnx.runtime.server.policies.joining.kept_rounds import KeptRounds
from splitonnx.runtime.server.policies.joining.rounds import Answer, Rounds, Share
from splitonnx.runtime.server.policies.models import ServerModel
from splitonnx.runtime.server.policies.per_client import ModelSource, PerClient
from splitonnx.runtime.server.policies.steps.shared_steps import SharedSteps
from splitonnx.runtime.server.policies.tasks import (
    Delivery,
    Joined,
    MemberReport,
    RoundReport,
    Task,
)
from splitonnx.runtime.server.policies.terms import Terms
from splitonnx.runtime.storage.round_records import RoundRecord


class SharedSource(ModelSource, Protocol):
    """What makes and publishes the one model, such as :class:`~model_makers.ModelMaker`."""

    def restore(self, tensors: Mapping[str, np.ndarray], version: int) -> ServerModel:
        """Create a model with a recorded state."""

    def publish(
        self, tensors: Mapping[str, np.ndarray], *, step: int, session: str, owner: str
    ) -> None:
        """Write a state to the server's folder as the outcome of a session's training."""


class SharedTraining:
    """A policy under which clients train one model; ``steps`` decides whose step runs when.

    Until a session has received the tensors of a round, it has a model of its own, which it can
    only predict with.  ``rounds``, ``terms``, ``record`` and ``clock`` are as for
    :class:`JointTraining`, and ``read_before`` as for :class:`KeptRounds`.
    """

    def __init__(
        self,
        source: SharedSource,
        rounds: Rounds,
        steps: SharedSteps,
        *,
        terms: Terms,
        manifest: PartyManifest,
        record: Callable[[RoundRecord], None],
        read_before: Callable[[int], RoundRecord | None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._source = source
        self._copies = PerClient(source)
        self._steps = steps
        self._terms = terms
        self._clock = clock
        self._kept = KeptRounds(
            rounds.newest, specs=manifest.state, write=record, read_before=read_before
        )
        self._coordinator = Coordinator(
            rounds,
            manifest=manifest,
            record=self._kept.write,
            complete=self._complete,
            clock=clock,
        )
        self._due: deque[Delivery] = deque()  # that no task has caused
        self._owners: dict[str, str] = {}
        self._lost: set[str] = set()  # sessions whose steps were lost with the model
        self._returned: set[str] = set()  # sessions that may have received a round's tensors
        self._withdrawn: deque[TaskKey] = deque()
        self._lock = threading.Lock()  # of the model and its steps
        self._model: ServerModel | None = None
        if rounds.newest is not None:
            self._owners.update(rounds.newest.owners)
            self._model = source.restore(rounds.newest.tensors, rounds.newest.version)

    @property
    def models(self) -> Mapping[str, ServerModel]:
        """Return the models in memory, by the sessions that use them."""
        model = self._model
        shared = {} if model is None else dict.fromkeys(tuple(self._owners), model)
        return {**shared, **self._copies.models}

    def terms(self) -> Terms:
        """Return what the policy asks of clients."""
        return self._terms

    def report(self) -> RoundReport:
        """Return the numbers that describe the rounds, without waiting for one that is closed."""
        return self._coordinator.report()

    def report_members(self) -> Mapping[str, MemberReport]:
        """Return what is known of each session, without waiting for a round that is closed."""
        version = 0 if self._model is None else self._model.version
        return {
            name: self._coordinator.report_member(name, version) for name in tuple(self._owners)
        }

    def join(self, hello: Hello, owner: str, *, resume: bool) -> Joined:
        """Admit a session, which continues where it last received the tensors of a round.

        Raises:
            ForeignSession: the session belongs to another owner.
            SessionLost, BundleMismatch, ServerBusy: see :class:`ModelMaker`.
        """
        session = hello.session
        if self._owners.get(session, owner) != owner:
            raise ForeignSession(session)
        with self._working():
            self._restore_if_lost()
            self._return_if_behind(session, hello.candidates)
        self._lost.discard(session)
        adopted = self._coordinator.list_adopted(session)
        if adopted:
            joined = Joined(owner=owner, step=adopted[0])
        else:
            joined = self._copies.join(hello, owner, resume=resume)
            if hello.generation > 1 and joined.step == hello.start:
                self._returned.add(session)
        self._owners[session] = joined.owner
        return replace(joined, is_shared=True, is_joint=self._steps.are_joint)

    def submit(self, task: Task) -> Generator[Delivery, None, None]:
        """Accept a session's share, or run a task on the one model; see :class:`Policy`.

        Deliveries are for all sessions that wait for the same round or joint step.

        Raises:
            DataError, StageFailed, WorkerLost: the task cannot be carried out.
            RemoteProtocolError, StepEnded: the message is not allowed now.
        """
        session, phase = task.key.session, task.key.phase
        if phase not in (*STEP_PHASES, SHARE) and session in self._copies.models:
            yield from self._copies.submit(task)
            return
        with self._working():
            self._require_whole(session)
            if phase == SHARE:
                share = self._coordinator.read(task)
                self._kept.note_leaving(session, leaves=share.leaves)
                yield from self._answer(self._accept(share))
            elif phase in STEP_PHASES:
                self._require_adopted(session)
                self._steps.add(task, self._clock())
            else:
                yield from self._require_model().perform(task)
            if phase in (*STEP_PHASES, SHARE) and self._model is not None:
                yield from self._run_steps(self._model, task.key)

    def withdraw(self, key: TaskKey) -> None:
        """Abort a task that is not finished, without waiting for one that runs."""
        if key.phase == SHARE:
            self._coordinator.withdraw(key.session)
        elif key.phase not in STEP_PHASES and key.session in self._copies.models:
            self._copies.withdraw(key)
        else:
            self._withdrawn.append(key)
            self._settle()

    def list_steps(self, session: str) -> tuple[int, ...]:
        """Return the steps at which a session received the tensors of a round."""
        adopted = self._coordinator.list_adopted(session)
        if adopted or session not in self._copies.models:
            return adopted
        return self._copies.list_steps(session)

    def rewind(self, session: str, step: int) -> None:
        """Go back with a session alone, and the model keeps what it learned; or all go back."""
        with self._working():
            self._return_if_behind(session, [step])
        self._kept.note_leaving(session, leaves=False)
        self._coordinator.rewind(session, step)
        if session in self._copies.models:
            self._copies.rewind(session, step)

    def save(self, request: Save) -> None:
        """Write the outcome of the training, if requested; the rounds' records are durable.

        If the session received a round's tensors after the round was recorded, or the record could
        not be written, the round is recorded again.

        Raises:
            BundleError, NotSaved: the state cannot be written, or only a round's end can be
                restored.
            WorkerLost: the session's steps were lost.
        """
        session, step = request.session, request.step
        if session in self._copies.models:
            self._copies.save(request)
            return
        with self._working():
            self._require_whole(session)
            if not request.publish:
                adoptions = self._coordinator.list_adoptions()
                self._kept.keep(session, step, adoptions=adoptions, owners=dict(self._owners))
                return
            state = self._kept.find_end(session) or self._require_model().executor.state()
        self._source.publish(state, step=step, session=session, owner=self._owners[session])

    def finish(self, session: str) -> None:
        """End a session for good; the rounds stop waiting for it, and forget it."""
        if session in self._copies.models:
            self._copies.finish(session)
        self._kept.note_leaving(session, leaves=False)
        self._coordinator.forget(session)

    def unload(self, session: str) -> None:
        """Do nothing for a session that trains the one model, whose rounds are on disk."""
        if session in self._copies.models:
            self._copies.unload(session)

    def is_lost(self, session: str) -> bool:
        """Return whether the session's steps were lost, because a worker process has ended."""
        if (copy := self._copies.models.get(session)) is not None:  # a round may end it meanwhile
            return copy.is_lost
        if self._model is not None and self._model.is_lost:
            return True
        return session in self._lost

    def leave(self, session: str) -> None:
        """Release what a session has; the rounds still wait for it, as it may return."""
        self._coordinator.withdraw(session)  # before its model, which the first round may choose
        self._drop_copy(session)
        self._kept.note_leaving(session, leaves=False)
        self._returned.discard(session)
        self._lost.discard(session)
        if not self._coordinator.list_adopted(session):
            self._owners.pop(session, None)

    def tick(self, now: float) -> Iterator[Delivery]:
        """Yield the deliveries of a round or a joint step that need not wait any longer."""
        with self._working():
            self._restore_if_lost()
            while self._due:
                yield self._due.popleft()
            yield from self._answer(self._coordinator.close_if_due(now))
            if self._model is not None:
                for silent in self._steps.end_if_silent(self._model, now):
                    self._coordinator.stop_waiting(silent)
                yield from self._run_steps(self._model)

    def _accept(self, share: Share) -> list[Answer]:
        """Return the answers that a share causes.

        A client that lost its first joint step receives what it made the step with, so that it can
        send the same tensors again.
        """
        again = self._coordinator.find_received(share) if self._steps.are_joint else None
        return self._coordinator.add(share) if again is None else [again]

    def _run_steps(self, model: ServerModel, cause: TaskKey | None = None) -> Iterator[Delivery]:
        """Run the steps that are ready; whoever a joint step did not wait for is no longer due."""
        awaited = self._coordinator.list_awaited()
        yield from self._steps.run(model, awaited, self._clock(), cause=cause)
        for session in self._steps.take_left_out():
            self._coordinator.stop_waiting(session)

    def _answer(self, answers: Iterable[Answer]) -> Iterator[Delivery]:
        """Yield the joined tensors for clients, which train the one model from now on."""
        model = self._model
        for answer in answers:
            self._kept.note_answer(answer.key.session)
            copy = self._drop_copy(answer.key.session)
            if copy is not None:
                copy.remove_saved()
            if model is not None:
                yield self._coordinator.deliver(answer, model.version)

    def _complete(self, joint: RoundRecord, answers: Sequence[Answer]) -> RoundRecord:
        """Add the model to a round's record; the first round chooses what it starts from."""
        model = self._model
        if model is None:
            first = min(answers, key=lambda answer: (-answer.key.step, answer.key.session))
            model = self._copies.models[first.key.session]
        state = model.executor.state()
        self._model = model  # not one that is lost
        owners = dict(self._owners)  # a copy, since sessions may come meanwhile
        return replace(
            joint,
            tensors={**joint.tensors, **state},
            version=model.version,
            owners={name: owners[name] for name in joint.adoptions if name in owners},
        )

    def _drop_copy(self, session: str) -> ServerModel | None:
        """Release a session's own model, if it has one; close it, unless all train it now."""
        copy = self._copies.release(session)
        if copy is not None and copy is not self._model:
            copy.close()
        return copy

    def _require_adopted(self, session: str) -> None:
        """Check that a session has received a round's tensors, as far as that is known."""
        if session in self._copies.models and session not in self._returned:
            raise RemoteProtocolError(
                f"it trains before it has received the joined model: with the policy "
                f"'{self._terms.policy}', a client shares before its first step"
            )
        self._require_model()
        self._drop_copy(session)

    def _require_model(self) -> ServerModel:
        if self._model is None:
            raise RemoteProtocolError("there is no joined model yet")
        return self._model

    def _restore_if_lost(self) -> None:
        """Go back to the newest round if the model was lost with its worker process.

        All sessions go back, and those that wait are told so.
        """
        lost, newest = self._model, self._kept.newest
        if lost is not None and lost.is_lost and newest is not None:
            self._restore(lost, newest, self._coordinator.withdraw_all())

    def _return_if_behind(self, session: str, candidates: Sequence[int]) -> None:
        """Go back by a round of joint steps, if a client that returns needs it and all can."""
        model, adoptions = self._model, self._coordinator.list_adoptions()
        if model is None or not self._steps.are_joint:
            return
        earlier = self._kept.find_common(session, candidates, adoptions, model.version)
        if earlier is not None:
            self._kept.return_to(earlier)
            self._restore(model, earlier, self._coordinator.return_to(earlier))
            self._lost.discard(session)

    def _restore(self, old: ServerModel, record: RoundRecord, shared: Iterable[TaskKey]) -> None:
        """Replace the model by a recorded one; ``shared`` are the keys of shares not joined."""
        self._model = self._source.restore(record.tensors, record.version)
        self._lost.update(self._owners)
        error = _describe_loss(old.name)
        self._steps.interrupt(old, error)
        self._due += [Delivery(key=key, version=self._model.version, error=error) for key in shared]
        old.close()

    def _require_whole(self, session: str) -> None:
        """Check that nothing that a session did is lost; otherwise, it goes back when it returns.

        Raises:
            WorkerLost: the worker process that held the model has ended.
        """
        self._restore_if_lost()
        if session in self._lost:
            raise _describe_loss(session)

    @contextmanager
    def _working(self) -> Iterator[None]:
        """Hold the lock of the model, and do what was asked for meanwhile."""
        try:
            with self._lock:
                self._handle_withdrawn()
                yield
        finally:
            self._settle()

    def _settle(self) -> None:
        """Abort the withdrawn tasks, unless a thread works with the model and will do so."""
        while self._withdrawn and self._lock.acquire(blocking=False):
            try:
                self._handle_withdrawn()
            finally:
                self._lock.release()

    def _handle_withdrawn(self) -> None:
        while self._withdrawn:
            key = self._withdrawn.popleft()
            if key.phase in STEP_PHASES:
                self._steps.withdraw(self._model, key)
            elif self._model is not None:
                self._model.abandon(key)


def _describe_loss(session: str) -> WorkerLost:
    return WorkerLost(session, "the model goes back to the newest round")
