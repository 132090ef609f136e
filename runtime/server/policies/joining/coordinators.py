"""The coordinator of rounds: reads what clients share, has it joined, and words the answers.

It guards the rounds against several threads, and records a closed round before anybody learns of
it, so that clients that return after a failure receive the same tensors again.  It knows no model:
the policy adds what it has to what is shared and recorded.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Sequence

import numpy as np

from splitonnx.errors import BundleError, NotSaved, RemoteProtocolError, SplitonnxError
from splitonnx.manifests import PartyManifest
from splitonnx.messages import TaskKey
from splitonnx.names import OWN, SERVER, SHARE
from splitonnx.runtime.server.policies.joining.rounds import Adoptions, Answer, Rounds, Share
from splitonnx.runtime.server.policies.tasks import Delivery, MemberReport, RoundReport, Task
from splitonnx.runtime.storage.round_records import RoundRecord
from splitonnx.sharing import LEAVES, ROUND, SAMPLES, name_joined

MOST_SAMPLES = 2**53
"""The largest number of samples that a client may claim, so that it is exact in float64."""

Completion = Callable[[RoundRecord, Sequence[Answer]], RoundRecord]
"""Adds to the record of a closed round what a policy needs to continue after it."""

_logger = logging.getLogger("splitonnx.server")


def keep_record(joint: RoundRecord, answers: Sequence[Answer]) -> RoundRecord:
    """Add nothing to a round's record."""
    return joint


class Coordinator:
    """The rounds of one bundle, which several threads may use.

    ``record`` writes a closed round to disk, with what ``complete`` adds to it.  ``answered`` is
    called for each client that is answered, before anything else may happen in the rounds.
    ``clock`` is monotonic, in seconds.
    """

    def __init__(
        self,
        rounds: Rounds,
        *,
        manifest: PartyManifest,
        record: Callable[[RoundRecord], None],
        complete: Completion = keep_record,
        answered: Callable[[Answer], None] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._rounds = rounds
        self._record = record
        self._complete = complete
        self._answered = answered
        self._clock = clock
        self._lock = threading.Lock()
        wires = [wire.tensor.name for wire in manifest.phase(SHARE).wires if wire.sender != SERVER]
        self._expected = frozenset(wires)
        self._sent = [name for name in wires if name not in (SAMPLES, LEAVES)]

    @property
    def newest(self) -> RoundRecord | None:
        """Return the last closed round, or ``None`` before the first."""
        return self._rounds.newest

    def report(self) -> RoundReport:
        """Return the numbers that describe the rounds, without waiting for one that is closed."""
        return self._rounds.report()

    def report_member(self, session: str, version: int) -> MemberReport:
        """Return what is known of a session, without waiting for a round that is closed."""
        return self._rounds.report_member(session, version)

    def list_adopted(self, session: str) -> tuple[int, ...]:
        """Return the steps at which a session received joined tensors, newest first."""
        with self._lock:
            return self._rounds.list_adopted(session)

    def list_adoptions(self) -> Adoptions:
        """Return for each session the steps and numbers of the rounds whose tensors it received."""
        with self._lock:
            return self._rounds.adoptions

    def list_awaited(self) -> frozenset[str]:
        """Return the sessions that train in the open round: members that have not shared."""
        with self._lock:
            return self._rounds.list_awaited()

    def read(self, task: Task) -> Share:
        """Check a client's share.

        Raises:
            RemoteProtocolError: it is incomplete, or its numbers are out of range.
        """
        tensors = task.tensors
        if task.turn or tensors.keys() != self._expected:
            raise RemoteProtocolError("it shares other tensors than the manifest declares")
        samples, leaves = int(tensors[SAMPLES]), int(tensors[LEAVES])
        if not 0 <= samples <= MOST_SAMPLES or leaves not in (0, 1):
            raise RemoteProtocolError(f"it shares {samples} samples, and {leaves} as a yes or no")
        return Share(
            key=task.key,
            samples=samples,
            leaves=bool(leaves),
            tensors={name: tensors[name] for name in self._sent},  # a wire's name has a suffix
        )

    def add(self, share: Share) -> list[Answer]:
        """Accept a client's share, and return the answers that are due."""
        return self._step(lambda: self._rounds.add(share, self._clock()))

    def find_received(self, share: Share) -> Answer | None:
        """Return the answer that a client had before; see :meth:`Rounds.find_received`."""
        with self._lock:
            return self._rounds.find_received(share)

    def close_if_due(self, now: float) -> list[Answer]:
        """Close the open round if it need not wait any longer, and return its answers."""
        return self._step(lambda: self._rounds.close_if_due(now))

    def withdraw(self, session: str) -> None:
        """Remove a session's share from the open round."""
        with self._lock:
            self._rounds.withdraw(session)

    def withdraw_all(self) -> list[TaskKey]:
        """Remove every share from the open round, and return their keys."""
        with self._lock:
            return self._rounds.withdraw_all()

    def stop_waiting(self, session: str) -> None:
        """Stop waiting for a session until it shares again."""
        with self._lock:
            self._rounds.leave(session)

    def forget(self, session: str) -> None:
        """Forget a session that has ended for good, and stop waiting for it."""
        with self._lock:
            self._rounds.forget(session)

    def return_to(self, earlier: RoundRecord) -> list[TaskKey]:
        """Continue after an earlier round; return the keys of the shares that are discarded."""
        with self._lock:
            keys = self._rounds.withdraw_all()
            self._rounds.return_to(earlier)
        return keys

    def rewind(self, session: str, step: int) -> None:
        """Forget what a session received after ``step``, to which it goes back."""
        with self._lock:
            self._rounds.rewind(session, step)

    def deliver(self, answer: Answer, version: int) -> Delivery:
        """Return the joined tensors for a client whose model has a version."""
        joint = answer.joint
        tensors = {name_joined(n.removesuffix(OWN)): joint.tensors[n] for n in self._sent}
        tensors[ROUND] = np.array(joint.number)
        return Delivery(key=answer.key, version=version, tensors=tensors, is_last=True)

    def _step(self, step: Callable[[], list[Answer]]) -> list[Answer]:
        """Perform a step of the rounds, and write the round to disk if that closed one.

        A round that cannot be completed stays open, and the step has not been performed.
        """
        with self._lock:
            before = self._rounds.duplicate()
            answers = step()
            joint = self._rounds.newest
            if joint is not None and joint is not before.newest:
                try:
                    joint = self._complete(joint, answers)
                except SplitonnxError:
                    self._rounds = before
                    raise
                self._write(joint, len(answers))
            for answer in answers:
                if self._answered is not None:
                    self._answered(answer)
        return answers

    def _write(self, joint: RoundRecord, shares: int) -> None:
        level = logging.DEBUG if joint.number else logging.INFO  # there may be one for each step
        _logger.log(level, "round %d: %d shares joined", joint.number, shares)
        try:
            self._record(joint)
        except (BundleError, NotSaved) as error:
            _logger.error("round %d is kept in memory alone: %s", joint.number, error)
