"""A relay: clients train one after the other, and each hands on what it learned.

A round is the turn of one client: what it shares at the end of its turn is handed to the client
that has waited longest.  A client whose turn takes too long loses it, and what it shares later is
not handed on.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from splitonnx.runtime.server.policies.joining.rounds import Answer, RoundRules, Rounds, Share, join
from splitonnx.runtime.storage.round_records import RoundRecord


class Relay(Rounds):
    """The turns of several clients with one model; see :class:`Rounds` for the interface.

    The first turn begins when ``clients_min`` clients are there.  The session that has the turn is
    recorded with the model, so that it keeps the turn if the server fails.
    """

    def __init__(self, rules: RoundRules, newest: RoundRecord | None = None) -> None:
        super().__init__(rules, newest)
        self._holder = "" if newest is None else newest.holder
        self._begun: float | None = None  # when the turn began
        self._missing: set[str] = set()  # those that lost their turn and have not come back

    def add(self, share: Share, now: float) -> list[Answer]:
        """Accept a client's share, and return the answers that are due.

        The client waits for its next turn, except if it leaves.  What it shares is handed on only
        if it had the turn.
        """
        session = share.key.session
        self._missing.discard(session)
        self._members.setdefault(session)
        if self.newest is not None and self._is_due(share, self.newest):
            self._hand_on(share, self.newest.number + 1)
        self._open[session] = share
        answers = []
        if share.leaves and self.newest is not None:
            answers = [self._answer(self._open.pop(session), self.newest)]
            self.leave(session)
        return answers + self.close_if_due(now)

    def close_if_due(self, now: float) -> list[Answer]:
        """Pass the turn to the next client if nobody has it, or whoever has it is too slow."""
        if self.newest is None:
            if not self._open or len(self._open) < self._rules.clients_min:
                return []
            self._begin()
        if self._holder and self._has_timed_out(now):
            self._missing.add(self._holder)
            self._pass_turn()
        if not self._holder and self._open:
            self._holder = next(iter(self._members))
        if self._begun is None and self._holder:
            self._begun = now
        if self._holder not in self._open or self.newest is None:
            return []
        self._begun = now
        return [self._answer(self._open.pop(self._holder), self.newest)]

    def leave(self, session: str) -> None:
        """Stop waiting for a session.  Call :meth:`close_if_due` for what this causes."""
        self.withdraw(session)
        self._missing.discard(session)
        if self._holder == session:
            self._pass_turn()
        self._members.pop(session, None)
        if not self._members:
            self._holder = ""

    def _is_due(self, share: Share, newest: RoundRecord) -> bool:
        """Return whether a share is what the client learned in its turn; count it if it is late."""
        step, number = self._find_adopted(share.key.session)
        if share.samples == 0 or step == share.key.step:
            return False  # it only waits, or was handed on before its answer was lost
        is_due = self._holder == share.key.session and number == newest.number
        self._late += not is_due
        return is_due

    def _has_timed_out(self, now: float) -> bool:
        """Return whether others wait for the client that has the turn, for too long."""
        timeout, waits = self._rules.timeout, self._open.keys() - {self._holder}
        if timeout is None or self._begun is None or not waits:
            return False
        return now - self._begun >= timeout

    def _pass_turn(self) -> None:
        """Give the turn to the next member in order, which need not be waiting yet."""
        order = list(self._members)
        place = order.index(self._holder) if self._holder in order else -1
        others = [name for name in order[place + 1 :] + order[: place + 1] if name != self._holder]
        if self._holder in self._missing:
            del self._members[self._holder]
            self._holder = ""
        self._holder = next(iter(others), self._holder)
        self._begun = None

    def _hand_on(self, share: Share, number: int) -> None:
        self._remember(share, number)
        self._pass_turn()
        self._record_turn(number, share.tensors)

    def _begin(self) -> None:
        """Begin with what the clients start from."""
        shares = [self._open[session] for session in sorted(self._open)]
        self._holder = next(iter(self._members))
        self._record_turn(0, join(shares))

    def _record_turn(self, number: int, tensors: Mapping[str, np.ndarray]) -> None:
        """Make the newest round; the client that has the turn keeps it if the server fails."""
        following = self._open.get(self._holder)
        if following is not None:  # it is answered next
            self._remember(following, number)
        self._record(number, tensors, self._holder)
