"""The options of a server's policy: whether and how it joins what its clients learn."""

from __future__ import annotations

from dataclasses import dataclass

from splitonnx.errors import UsageError
from splitonnx.names import (
    ASYNCHRONOUS,
    PER_CLIENT,
    SEQUENTIAL,
    SPLITFED_V1,
    SPLITFED_V2,
    SYNCHRONOUS,
)
from splitonnx.runtime.server.policies.terms import Terms

POLICIES = (PER_CLIENT, SEQUENTIAL, SPLITFED_V1, SPLITFED_V2, SYNCHRONOUS, ASYNCHRONOUS)
"""The names of the policies that a server can have."""
ROUND_TIMEOUT = 300.0
"""The default number of seconds that a round waits for its clients."""

STALENESS = 4
"""The default number of rounds that a client may be ahead of the slowest."""


@dataclass(frozen=True, kw_only=True)
class PolicyOptions:
    """How a server joins what its clients learn.

    Args:
        name: ``per-client``, where each client trains a copy of the server's part and nothing is
            joined; ``sequential``, where clients train one after the other, and a round is the turn
            of one; ``splitfed-v1``, where the copies of both parts are averaged in each round;
            ``splitfed-v2``, where the server trains one model on the clients' steps one by one, and
            the clients' parts are averaged in each round; ``synchronous``, where the batches of all
            clients make one step of the server; or ``asynchronous``, where nobody waits for a
            round.
        clients_min: the number of clients that the first round waits for.
        quorum: the number of clients with which a round may be closed when its time is over.
        round_timeout: seconds after which a round stops waiting for clients, counted from the first
            share, or in which a client must finish its turn; ``None`` to wait forever.
        local_steps: the number of steps that a client trains in each round.
        staleness: how many rounds more than the slowest a client may have made, with
            ``asynchronous``.
        rounds: the number of rounds after which clients stop; 0 if each trains all its epochs.

    Raises:
        UsageError: there is no such policy, or a number is out of range.
    """

    name: str = PER_CLIENT
    clients_min: int = 1
    quorum: int = 1
    round_timeout: float | None = ROUND_TIMEOUT
    local_steps: int = 1
    rounds: int = 0
    staleness: int = STALENESS

    def __post_init__(self) -> None:
        if self.name not in POLICIES:
            raise UsageError(f"there is no policy '{self.name}'; take one of {', '.join(POLICIES)}")
        for subject, number, least in (
            ("clients_min", self.clients_min, 1),
            ("quorum", self.quorum, 1),
            ("local_steps", self.local_steps, 1),
            ("rounds", self.rounds, 0),
            ("staleness", self.staleness, 0),
        ):
            if number < least:
                raise UsageError(f"{subject} must be at least {least}, not {number}")
        if self.round_timeout is not None and not self.round_timeout > 0:
            raise UsageError(f"round_timeout must be above 0 seconds, not {self.round_timeout:g}")

    @property
    def terms(self) -> Terms:
        """Return what the policy asks of clients."""
        if self.name == PER_CLIENT:
            return Terms(policy=PER_CLIENT)
        return Terms(policy=self.name, local_steps=self.local_steps, rounds=self.rounds)
