"""Shares that are joined as they come: each one is a round, and nobody waits for a whole round.

A client that is too far ahead of the slowest one waits for it, so that no share is based on a model
that is much older than the newest.
"""

from __future__ import annotations

from splitonnx.runtime.server.policies.joining.averages import mix
from splitonnx.runtime.server.policies.joining.rounds import Answer, RoundRules, Rounds, Share
from splitonnx.runtime.storage.round_records import RoundRecord

WEIGHT = 0.6
"""The weight of a share that is based on the newest model."""
DECAY = 0.5
"""How fast the weight falls with the number of rounds since the model that a share is based on."""


class Asynchronous(Rounds):
    """Rounds of one share each; see :class:`Rounds` for the interface.

    A client waits while it has shared over ``staleness`` times more often than the member that has
    shared least, counted from when the later of the two came.  A member that lets others wait for
    the time of a round is not waited for any longer, until it shares again.  A client that leaves
    waits for the other members to leave, so that all of them end with the same model.

    Source: Xie, Koyejo and Gupta, Asynchronous Federated Optimization (2019), for the weights; Ho
    et al., More Effective Distributed ML via a Stale Synchronous Parallel Parameter Server (2013),
    for the bound.
    """

    def __init__(
        self, rules: RoundRules, newest: RoundRecord | None = None, *, staleness: int = 4
    ) -> None:
        super().__init__(rules, newest)
        self._staleness = staleness
        self._shared: dict[str, int] = dict.fromkeys(self._members, 0)  # how often

    def add(self, share: Share, now: float) -> list[Answer]:
        """Accept a client's share, and return the answers that are due."""
        session = share.key.session
        if self.newest is None:
            return super().add(share, now)
        self._members[session] = None
        self._shared.setdefault(session, self._find_least())
        step, number = self._find_adopted(session)
        is_new = number >= 0 and step != share.key.step  # else it has no base, or has been joined
        if share.samples > 0 and is_new:
            self._join(share, self.newest, number)
        self._open[session] = share
        self._arrivals[session] = (share.key.step, now)
        return self.close_if_due(now)

    def close_if_due(self, now: float) -> list[Answer]:
        """Answer the clients that need not wait any longer."""
        newest = self.newest
        if newest is None:
            answers = super().close_if_due(now)
            self._shared = dict.fromkeys(self._members, 0)
            return answers
        self._drop_slow(now)
        due = self._list_due(now)
        answers = [self._answer(share, newest) for share in due]
        for share in due:
            session = share.key.session
            del self._open[session], self._arrivals[session]
            if share.leaves:
                self.leave(session)
        return answers

    def leave(self, session: str) -> None:
        """Stop waiting for a session.  Call :meth:`close_if_due` for what this causes."""
        super().leave(session)
        self._shared.pop(session, None)

    def _find_least(self) -> int:
        """Return how often the member has shared that has shared least, of those that train."""
        leaving = {name for name, share in self._open.items() if share.leaves}
        counts = (count for name, count in self._shared.items() if name not in leaving)
        return min(counts, default=0)

    def _list_due(self, now: float) -> list[Share]:
        """Return the shares whose clients need not wait any longer."""
        timeout, most = self._rules.timeout, self._find_least() + self._staleness
        is_end = all(name in self._open and self._open[name].leaves for name in self._members)
        due = []
        for name, share in self._open.items():
            is_over = timeout is not None and now - self._arrivals[name][1] >= timeout
            if is_end or is_over or (not share.leaves and self._shared[name] <= most):
                due.append(share)
        return due

    def _drop_slow(self, now: float) -> None:
        """Stop waiting for the members that others have waited for too long."""
        timeout = self._rules.timeout
        waits = [self._arrivals[name][1] for name, share in self._open.items() if not share.leaves]
        if timeout is not None and waits and now - min(waits) >= timeout:
            for session in self._members.keys() - self._open.keys():
                self.leave(session)

    def _join(self, share: Share, newest: RoundRecord, number: int) -> None:
        """Make the newest round of a share, which is based on the round ``number``."""
        session = share.key.session
        weight = WEIGHT * (1 + newest.number - number) ** -DECAY
        self._shared[session] += 1
        self._remember(share, newest.number + 1)
        self._record(newest.number + 1, mix(newest.tensors, share.tensors, weight))
