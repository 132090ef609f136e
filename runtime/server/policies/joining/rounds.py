"""Rounds: when the shares of several clients are joined, and which clients a round waits for.

A share is what a client learned since it last received joined tensors.  A round is closed when
every member has shared, or when its time is over and enough have; then the shares are joined, and
every client that shared receives the result.  The first round is closed before anybody trains, so
that all clients start from one model.  This module computes; it neither sends, stores nor waits.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Self

import numpy as np

from splitonnx.messages import TaskKey
from splitonnx.runtime.server.policies.joining.averages import average
from splitonnx.runtime.server.policies.tasks import MemberReport, RoundReport
from splitonnx.runtime.storage.round_records import RoundRecord

MOST_REMEMBERED = 1024
"""Of how many sessions it is remembered which round's tensors they have."""


@dataclass(frozen=True, kw_only=True)
class RoundRules:
    """When a round is closed.

    The first round waits for ``clients_min`` clients.  A later round is closed when every member
    has shared, or, ``timeout`` seconds after the first share, when at least ``quorum`` have; fewer
    are enough if no more are left.  A member that has not shared by then is not waited for any
    longer, until it shares again.  ``timeout`` is ``None`` to wait for every member forever.
    """

    clients_min: int = 1
    quorum: int = 1
    timeout: float | None = None


@dataclass(frozen=True, kw_only=True, eq=False)
class Share:
    """What a client shares: its own tensors, and those of the server's copy that it trained.

    ``key.step`` is the client's step.  ``samples`` is the number of samples trained with since the
    client last received joined tensors; with 0, it only asks for them.  ``leaves`` means that the
    client will not share again.
    """

    key: TaskKey
    samples: int
    leaves: bool
    tensors: Mapping[str, np.ndarray] = field(repr=False)


Adoptions = dict[str, tuple[tuple[int, int], ...]]
"""For each session, the steps at which it received joined tensors, with the rounds' numbers."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """Joined tensors for the client that sent the share ``key``."""

    key: TaskKey
    joint: RoundRecord


def join(shares: Sequence[Share]) -> dict[str, np.ndarray]:
    """Return the average of what clients learned since they had the same model.

    Before anybody has trained, clients may start from several states, such as the outcome of an
    earlier training and an untrained bundle.  Then those that have made the most steps count.
    """
    if not any(share.samples for share in shares):
        most = max(share.key.step for share in shares)
        shares = [share for share in shares if share.key.step == most]
    return average([(share.samples, share.tensors) for share in shares])


class Rounds:
    """The rounds of one model; ``newest`` is the last closed round, or ``None`` before the first.

    Times are seconds of a monotonic clock.
    """

    def __init__(self, rules: RoundRules, newest: RoundRecord | None = None) -> None:
        self._rules = rules
        self.newest = newest
        self._members = dict.fromkeys(() if newest is None else newest.members)  # in order
        self._adoptions: Adoptions = {} if newest is None else dict(newest.adoptions)
        self._open: dict[str, Share] = {}
        self._arrivals: dict[str, tuple[int, float]] = {}  # of shares in the open round
        self._late = 0
        self._previous: RoundRecord | None = None  # the round before the newest

    def add(self, share: Share, now: float) -> list[Answer]:
        """Accept a client's share, and return the answers that are due.

        A share that was already joined, and one that was computed from an older round's tensors, is
        answered with the newest round's tensors and is not joined.
        """
        session = share.key.session
        self._members[session] = None
        answers = []
        if self.newest is not None and not self._is_due(share, self.newest):
            answers = [self._answer(share, self.newest)]
            if share.leaves:
                del self._members[session]
        else:
            self._open[session] = share
            step, arrival = self._arrivals.get(session, (share.key.step, now))
            self._arrivals[session] = (share.key.step, arrival if step == share.key.step else now)
        return answers + self.close_if_due(now)

    def close_if_due(self, now: float) -> list[Answer]:
        """Close the open round if it need not wait any longer, and return its answers."""
        rules, shared = self._rules, self._open
        if not shared:
            return []
        if self.newest is None:
            return self._close() if len(shared) >= rules.clients_min else []
        if len(shared) < min(rules.quorum, len(self._members)):
            return []
        begun = min(self._arrivals[session][1] for session in shared)
        is_over = rules.timeout is not None and now - begun >= rules.timeout
        return self._close() if is_over or self._members.keys() <= shared.keys() else []

    def withdraw(self, session: str) -> None:
        """Remove a session's share from the open round.

        If the session shares again at the same step, as after a lost connection, it has waited
        since it shared first.
        """
        self._open.pop(session, None)

    def find_received(self, share: Share) -> Answer | None:
        """Return the answer that a session had at this step, if it was of the round before.

        Return ``None`` if the client has trained since, so that it does not ask for that answer.
        """
        session, previous = share.key.session, self._previous
        if previous is None or share.samples > 0:
            return None
        if (share.key.step, previous.number) not in self._adoptions.get(session, ()):
            return None
        return Answer(key=share.key, joint=previous)

    def withdraw_all(self) -> list[TaskKey]:
        """Remove every share from the open round, and return their keys."""
        keys = [share.key for share in self._open.values()]
        for key in keys:
            self.withdraw(key.session)
        return keys

    def duplicate(self) -> Self:
        """Return the same rounds, which change apart from these."""
        twin = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, dict | set):
                setattr(twin, name, value.copy())
        return twin

    def forget(self, session: str) -> None:
        """Forget a session that has ended for good, and stop waiting for it."""
        self.leave(session)
        self._adoptions.pop(session, None)

    def leave(self, session: str) -> None:
        """Stop waiting for a session.  Call :meth:`close_if_due` for what this closes."""
        self.withdraw(session)
        self._members.pop(session, None)

    def return_to(self, earlier: RoundRecord) -> None:
        """Continue after an earlier round, as if nothing had happened since."""
        self.newest, self._previous = earlier, None
        self._members, self._adoptions = dict.fromkeys(earlier.members), dict(earlier.adoptions)
        self._open, self._arrivals = {}, {}

    def rewind(self, session: str, step: int) -> None:
        """Forget what a session received after ``step``, to which it goes back."""
        self.withdraw(session)
        if session in self._adoptions:
            received = self._adoptions[session]
            self._adoptions[session] = tuple(entry for entry in received if entry[0] <= step)

    @property
    def adoptions(self) -> Adoptions:
        """Return for each session when it received joined tensors, newest first."""
        return dict(self._adoptions)

    def list_adopted(self, session: str) -> tuple[int, ...]:
        """Return the steps at which a session received joined tensors, newest first."""
        return tuple(step for step, _ in self._adoptions.get(session, ()))

    def list_awaited(self) -> frozenset[str]:
        """Return the members that have not shared in the open round."""
        return frozenset(self._members.keys() - self._open.keys())

    def report(self) -> RoundReport:
        """Return the numbers that describe the rounds."""
        return RoundReport(
            closed=0 if self.newest is None else self.newest.number,
            members=len(self._members),
            waiting=len(self._open),
            late=self._late,
        )

    def report_member(self, session: str, version: int) -> MemberReport:
        """Return what is known of a session whose copy has a version."""
        newest, (_, number) = self.newest, self._find_adopted(session)
        return MemberReport(
            version=version,
            round=None if number < 0 else number,
            rounds_behind=0 if newest is None else max(0, newest.number - number),
            is_waiting=session in self._open,
        )

    def _is_due(self, share: Share, newest: RoundRecord) -> bool:
        """Return whether a share is to be joined in the open round; count it if it is late."""
        if share.samples == 0:
            return False
        step, number = self._find_adopted(share.key.session)
        is_late, is_repeated = number < newest.number, step == share.key.step
        self._late += is_late
        return not (is_late or is_repeated)

    def _find_adopted(self, session: str) -> tuple[int, int]:
        """Return at which step a session last received joined tensors, and of which round."""
        return next(iter(self._adoptions.get(session, ())), (0, -1))

    def _answer(self, share: Share, joint: RoundRecord) -> Answer:
        self._remember(share, joint.number)
        return Answer(key=share.key, joint=joint)

    def _remember(self, share: Share, number: int) -> None:
        """Remember that a session has the tensors of a round since the step of a share."""
        session, step = share.key.session, share.key.step
        earlier = self._adoptions.pop(session, ())
        self._adoptions[session] = ((step, number), *(e for e in earlier if e[0] < step))[:3]
        if len(self._adoptions) > MOST_REMEMBERED:
            del self._adoptions[next(iter(self._adoptions))]

    def _close(self) -> list[Answer]:
        """Join the shares of the open round, and answer them."""
        shares = [self._open[session] for session in sorted(self._open)]
        tensors = join(shares)
        number = 0 if self.newest is None else self.newest.number + 1
        for share in shares:
            self._remember(share, number)
        left = {share.key.session for share in shares if share.leaves}
        self._members = {name: None for name in self._open if name not in left}
        joint = self._record(number, tensors)
        self._open, self._arrivals = {}, {}
        return [Answer(key=share.key, joint=joint) for share in shares]

    def _record(
        self, number: int, tensors: Mapping[str, np.ndarray], holder: str = ""
    ) -> RoundRecord:
        """Make the newest round of tensors, with what is needed to continue after it."""
        self._previous = self.newest
        self.newest = RoundRecord(
            number=number,
            tensors=tensors,
            members=tuple(self._members),
            holder=holder,
            adoptions=dict(self._adoptions),
        )
        return self.newest
