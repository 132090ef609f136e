"""Policies that join what clients learn: each client trains a copy, and rounds join the copies.

Between two shares, a client trains a copy of the server's model of its own, as with the policy
``per-client``.  The rounds decide which shares are joined and when.  The optimizer's state of each
copy stays as it is.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import replace

import numpy as np

from splitonnx.errors import NotFinite
from splitonnx.manifests import PartyManifest
from splitonnx.messages import Hello, Save, TaskKey
from splitonnx.names import SHARE, STEP_PHASES
from splitonnx.runtime.server.policies.joining.coordinators import Coordinator
from splitonnx.runtime.server.policies.joining.rounds import Answer, Rounds, Share
from splitonnx.runtime.server.policies.models import ServerModel
from splitonnx.runtime.server.policies.per_client import PerClient
from splitonnx.runtime.server.policies.tasks import (
    Delivery,
    Joined,
    MemberReport,
    RoundReport,
    Task,
)
from splitonnx.runtime.server.policies.terms import Terms
from splitonnx.runtime.storage.round_records import RoundRecord
from splitonnx.sharing import list_joined


class JointTraining:
    """A policy under which clients train copies of one model, which rounds join.

    ``copies`` trains the copies, ``rounds`` joins them, and ``terms`` are told to clients.
    ``record`` writes a closed round to disk.  ``clock`` is monotonic, in seconds.
    """

    def __init__(
        self,
        copies: PerClient,
        rounds: Rounds,
        *,
        terms: Terms,
        manifest: PartyManifest,
        record: Callable[[RoundRecord], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._copies = copies
        self._coordinator = Coordinator(
            rounds, manifest=manifest, record=record, answered=self._note_due, clock=clock
        )
        self._terms = terms
        self._own = list_joined(manifest)
        self._due: dict[str, RoundRecord] = {}  # what a session's copy adopts when it is next used
        self._starts: dict[str, RoundRecord] = {}  # what it adopts before it trains, if it does

    @property
    def models(self) -> Mapping[str, ServerModel]:
        """Return the copies in memory, by the sessions that train them."""
        return self._copies.models

    def terms(self) -> Terms:
        """Return what the policy asks of clients."""
        return self._terms

    def report(self) -> RoundReport:
        """Return the numbers that describe the rounds, without waiting for one that is closed."""
        return self._coordinator.report()

    def report_members(self) -> Mapping[str, MemberReport]:
        """Return what is known of each session, without waiting for a round that is closed."""
        return {
            name: self._coordinator.report_member(name, report.version)
            for name, report in self._copies.report_members().items()
        }

    def join(self, hello: Hello, owner: str, *, resume: bool) -> Joined:
        """Load the session's copy from disk, or make a new one; see :class:`PerClient`.

        If the server failed, a client that comes back at its start may have received joined tensors
        already, and will not ask again.  Then its copy adopts the newest before it trains.  A
        client that only predicts keeps the copy that fits its own state.
        """
        joined = self._copies.join(hello, owner, resume=resume)
        self._coordinator.rewind(hello.session, joined.step)
        newest = self._coordinator.newest
        if newest is not None and hello.generation > 1 and joined.step == hello.start:
            self._starts[hello.session] = newest
        return joined

    def submit(self, task: Task) -> Generator[Delivery, None, None]:
        """Run a task on the session's copy, or take its share; see :class:`Policy`.

        The deliveries of a closed round are for all sessions that shared.

        Raises:
            DataError, StageFailed, WorkerLost: the task cannot be carried out.
            RemoteProtocolError: a share is incomplete, or its numbers are out of range.
            NotSaved: a state that the share replaces cannot be deleted from the disk.
        """
        if task.key.phase in STEP_PHASES or task.key.phase == SHARE:
            self._begin(task.key.session)
        self._catch_up(task.key.session)
        if task.key.phase != SHARE:
            yield from self._copies.submit(task)
            return
        share = self._add_own(self._coordinator.read(task))
        self.models[task.key.session].forget_stopped()
        yield from self._deliver(self._coordinator.add(share))

    def withdraw(self, key: TaskKey) -> None:
        """Abort a task that is not finished, and discard its changes or its share."""
        if key.phase != SHARE:
            self._copies.withdraw(key)
            return
        self._coordinator.withdraw(key.session)

    def list_steps(self, session: str) -> tuple[int, ...]:
        """Return the steps whose state can be restored for a session; see :class:`Policy`."""
        return self._copies.list_steps(session)

    def rewind(self, session: str, step: int) -> None:
        """Go back to the state of an earlier step; the rounds stay as they are."""
        self._due.pop(session, None)
        self._starts.pop(session, None)
        self._copies.rewind(session, step)
        self._coordinator.rewind(session, step)

    def save(self, request: Save) -> None:
        """Write a durable checkpoint of the session's copy; see :class:`Policy`."""
        self._begin(request.session)
        self._catch_up(request.session)
        self._copies.save(request)

    def finish(self, session: str) -> None:
        """End a session for good; the rounds stop waiting for it, and forget it."""
        self._copies.finish(session)
        self._coordinator.forget(session)

    def unload(self, session: str) -> None:
        """Write the session's copy to disk, unless it is already there; see :class:`Policy`."""
        self._catch_up(session)
        self._copies.unload(session)

    def is_lost(self, session: str) -> bool:
        """Return whether the copy was lost, because a worker process has ended."""
        return self._copies.is_lost(session)

    def leave(self, session: str) -> None:
        """Release the session's copy; the rounds still wait for the session, as it may return."""
        self._due.pop(session, None)
        self._starts.pop(session, None)
        self._copies.leave(session)
        self._coordinator.withdraw(session)

    def tick(self, now: float) -> Iterator[Delivery]:
        """Yield the deliveries of a round that need not wait any longer."""
        yield from self._deliver(self._coordinator.close_if_due(now))

    def _add_own(self, share: Share) -> Share:
        """Add to a client's share the tensors of the server's copy.

        Raises:
            NotFinite: the server's copy contains NaN or infinity.
        """
        own = self._copies.models[share.key.session].read(self._own)
        for name, array in own.items():
            if not np.isfinite(array).all():
                raise NotFinite(name, f"the server's copy at step {share.key.step}")
        return replace(share, tensors={**own, **share.tensors})

    def _note_due(self, answer: Answer) -> None:
        self._due[answer.key.session] = answer.joint

    def _deliver(self, answers: Iterable[Answer]) -> Iterator[Delivery]:
        for answer in answers:
            model = self.models.get(answer.key.session)
            if model is not None:  # otherwise it has left meanwhile
                yield self._coordinator.deliver(answer, model.version)

    def _begin(self, session: str) -> None:
        """Have a copy adopt what its client received before the server failed, unless it is old."""
        joint = self._starts.pop(session, None)
        if joint is not None:
            self._due.setdefault(session, joint)

    def _catch_up(self, session: str) -> None:
        """Put the joined tensors into a session's copy if it has not received them yet."""
        joint = self._due.pop(session, None)
        if joint is not None:
            own = {name: joint.tensors[name] for name in self._own}
            self._copies.models[session].adopt(own)
