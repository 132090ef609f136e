"""Policies that join what clients learn: each client trains a copy, and rounds join the copies.

Between two shares, a client trains a copy of the server's model of its own, as with the policy
``per-client``.  The rounds decide which shares are joined and when.  The optimizer's state of each
copy stays as it is.  A closed round is on disk before anybody learns of it, so that clients that
return after a failure receive the same tensors again.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np

from splitonnx.errors import BundleError, NotFinite, NotSaved, RemoteProtocolError
from splitonnx.manifests import PartyManifest
from splitonnx.messages import Hello, Save, TaskKey
from splitonnx.names import OWN, SERVER, SHARE, TRAIN
from splitonnx.runtime.server.policies.models import ServerModel
from splitonnx.runtime.server.policies.per_client import PerClient
from splitonnx.runtime.server.policies.rounds import Answer, Rounds, Share
from splitonnx.runtime.server.policies.tasks import (
    Delivery,
    Joined,
    MemberReport,
    RoundReport,
    Task,
)
from splitonnx.runtime.server.policies.terms import Terms
from splitonnx.runtime.storage.round_records import RoundRecord
from splitonnx.sharing import LEAVES, ROUND, SAMPLES, list_joined, name_joined

MOST_SAMPLES = 2**53
"""The largest number of samples that a client may claim, so that it is exact in float64."""

_logger = logging.getLogger("splitonnx.server")


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
        self._rounds = rounds
        self._terms = terms
        self._record = record
        self._clock = clock
        self._lock = threading.Lock()  # of the rounds; copies belong to their sessions
        self._own = list_joined(manifest)
        wires = [wire.tensor.name for wire in manifest.phase(SHARE).wires if wire.sender != SERVER]
        self._expected = frozenset(wires)
        self._sent = [name for name in wires if name not in (SAMPLES, LEAVES)]
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
        return self._rounds.report()

    def report_members(self) -> Mapping[str, MemberReport]:
        """Return what is known of each session, without waiting for a round that is closed."""
        return {
            name: self._rounds.report_member(name, report.version)
            for name, report in self._copies.report_members().items()
        }

    def join(self, hello: Hello, owner: str, *, resume: bool) -> Joined:
        """Load the session's copy from disk, or make a new one; see :class:`PerClient`.

        If the server failed, a client that comes back at its start may have received joined tensors
        already, and will not ask again.  Then its copy adopts the newest before it trains.  A
        client that only predicts keeps the copy that fits its own state.
        """
        joined = self._copies.join(hello, owner, resume=resume)
        with self._lock:
            self._rounds.rewind(hello.session, joined.step)
            came_back = hello.generation > 1 and joined.step == hello.start
            if self._rounds.newest is not None and came_back:
                self._starts[hello.session] = self._rounds.newest
        return joined

    def submit(self, task: Task) -> Iterator[Delivery]:
        """Run a task on the session's copy, or take its share; see :class:`Policy`.

        The deliveries of a closed round are for all sessions that shared.

        Raises:
            DataError, StageFailed, WorkerLost: the task cannot be carried out.
            RemoteProtocolError: a share is incomplete, or its numbers are out of range.
            NotSaved: a state that the share replaces cannot be deleted from the disk.
        """
        if task.key.phase in (TRAIN, SHARE):
            self._begin(task.key.session)
        self._catch_up(task.key.session)
        if task.key.phase != SHARE:
            yield from self._copies.submit(task)
            return
        share = self._read(task)
        self.models[task.key.session].forget_stopped()
        with self._lock:
            answers = self._close(lambda: self._rounds.add(share, self._clock()))
        yield from self._deliver(answers)

    def withdraw(self, key: TaskKey) -> None:
        """Abort a task that is not finished, and discard its changes or its share."""
        if key.phase != SHARE:
            self._copies.withdraw(key)
            return
        with self._lock:
            self._rounds.withdraw(key.session)

    def list_steps(self, session: str) -> tuple[int, ...]:
        """Return the steps whose state can be restored for a session; see :class:`Policy`."""
        return self._copies.list_steps(session)

    def rewind(self, session: str, step: int) -> None:
        """Go back to the state of an earlier step; the rounds stay as they are."""
        self._due.pop(session, None)
        self._starts.pop(session, None)
        self._copies.rewind(session, step)
        with self._lock:
            self._rounds.rewind(session, step)

    def save(self, request: Save) -> None:
        """Write a durable checkpoint of the session's copy; see :class:`Policy`."""
        self._begin(request.session)
        self._catch_up(request.session)
        self._copies.save(request)

    def finish(self, session: str) -> None:
        """End a session for good; the rounds stop waiting for it, and forget it."""
        self._copies.finish(session)
        with self._lock:
            self._rounds.forget(session)

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
        with self._lock:
            self._rounds.withdraw(session)

    def tick(self, now: float) -> Iterator[Delivery]:
        """Yield the deliveries of a round that need not wait any longer."""
        with self._lock:
            answers = self._close(lambda: self._rounds.close_if_due(now))
        yield from self._deliver(answers)

    def _read(self, task: Task) -> Share:
        """Check a client's share, and add the tensors of the server's copy.

        Raises:
            RemoteProtocolError: it is incomplete, or its numbers are out of range.
            NotFinite: the server's copy contains NaN or infinity.
        """
        key, tensors = task.key, task.tensors
        if task.turn or tensors.keys() != self._expected:
            raise RemoteProtocolError("it shares other tensors than the manifest declares")
        samples, leaves = int(tensors[SAMPLES]), int(tensors[LEAVES])
        if not 0 <= samples <= MOST_SAMPLES or leaves not in (0, 1):
            raise RemoteProtocolError(f"it shares {samples} samples, and {leaves} as a yes or no")
        own = self._copies.models[key.session].read(self._own)
        for name, array in own.items():
            if not np.isfinite(array).all():
                raise NotFinite(name, f"the server's copy at step {key.step}")
        shared = {name: tensors[name] for name in self._sent}
        return Share(
            key=key,
            samples=samples,
            leaves=bool(leaves),
            tensors={**own, **shared},  # the names of wires have a suffix
        )

    def _close(self, step: Callable[[], list[Answer]]) -> list[Answer]:
        """Perform a step of the rounds, and write the round to disk if that closed one."""
        before = self._rounds.newest
        answers = step()
        joint = self._rounds.newest
        if joint is not None and joint is not before:
            report = self._rounds.report()
            _logger.info("round %d: %d shares joined", joint.number, len(answers))
            _logger.debug("round %d: %s", joint.number, report)
            try:
                self._record(joint)
            except (BundleError, NotSaved) as error:
                _logger.error("round %d is kept in memory alone: %s", joint.number, error)
        for answer in answers:
            self._due[answer.key.session] = answer.joint
        return answers

    def _deliver(self, answers: Iterable[Answer]) -> Iterator[Delivery]:
        for answer in answers:
            joint, model = answer.joint, self.models.get(answer.key.session)
            if model is None:
                continue  # it has left meanwhile
            tensors = {name_joined(n.removesuffix(OWN)): joint.tensors[n] for n in self._sent}
            tensors[ROUND] = np.array(joint.number)
            yield Delivery(key=answer.key, version=model.version, tensors=tensors, is_last=True)

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
