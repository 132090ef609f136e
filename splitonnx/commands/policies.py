"""The options of ``serve`` that say how it joins what its clients learn."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Annotated

import typer

from splitonnx.commands.groups import list_given
from splitonnx.errors import UsageError
from splitonnx.names import (
    ASYNCHRONOUS,
    PER_CLIENT,
    SEQUENTIAL,
    SPLITFED_V1,
    SPLITFED_V2,
    SYNCHRONOUS,
)
from splitonnx.runtime.server.policies.policy_options import ROUND_TIMEOUT, STALENESS, PolicyOptions

_PANEL = "How what clients learn is joined"


class PolicyName(StrEnum):
    """The values that ``--policy`` accepts."""

    PER_CLIENT = PER_CLIENT
    SEQUENTIAL = SEQUENTIAL
    SPLITFED_V1 = SPLITFED_V1
    SPLITFED_V2 = SPLITFED_V2
    SYNCHRONOUS = SYNCHRONOUS
    ASYNCHRONOUS = ASYNCHRONOUS


@dataclass(frozen=True, kw_only=True)
class JoiningOptions:
    """The options for a server's policy; all but ``--policy`` need one that joins clients."""

    policy: Annotated[
        PolicyName,
        typer.Option(
            help="per-client: each client trains a copy of the server's part.  sequential: clients "
            "train one after the other, and hand on what they learned.  splitfed-v1: the copies "
            "of both parts are averaged in each round.  splitfed-v2: the server trains one model, "
            "and the clients' parts are averaged.  synchronous: the batches of all clients make "
            "one step.  asynchronous: like splitfed-v2, but nobody waits for a whole round.",
            rich_help_panel=_PANEL,
        ),
    ] = PolicyName.PER_CLIENT
    local_steps: Annotated[
        int, typer.Option(min=1, help="Steps of a client per round.", rich_help_panel=_PANEL)
    ] = 1
    rounds: Annotated[
        int,
        typer.Option(
            min=0,
            help="Rounds after which clients stop; 0 lets each train all its epochs.",
            rich_help_panel=_PANEL,
        ),
    ] = 0
    clients_min: Annotated[
        int,
        typer.Option(min=1, help="Clients that the first round waits for.", rich_help_panel=_PANEL),
    ] = 1
    quorum: Annotated[
        int,
        typer.Option(
            min=1,
            help="Clients with which a round can be closed when its time is over.",
            rich_help_panel=_PANEL,
        ),
    ] = 1
    round_timeout: Annotated[
        float,
        typer.Option(
            metavar="SECONDS",
            help="How long a round waits for its clients, from the first that shares; with "
            "sequential, how long a turn may take.",
            rich_help_panel=_PANEL,
        ),
    ] = ROUND_TIMEOUT
    staleness: Annotated[
        int,
        typer.Option(
            min=0,
            help="With asynchronous: rounds that a client may be ahead of the slowest.",
            rich_help_panel=_PANEL,
        ),
    ] = STALENESS

    def read(self) -> PolicyOptions:
        """Return the policy that the options describe.

        Raises:
            UsageError: an option was given that the policy does not have, or is out of range.
        """
        given = [name for name in list_given(self) if name != "--policy"]
        if self.policy is PolicyName.PER_CLIENT and given:
            raise UsageError(
                f"{', '.join(given)}: with a policy that joins clients only, such as --policy "
                f"{SPLITFED_V1}; per-client joins nothing"
            )
        if "--staleness" in given and self.policy is not PolicyName.ASYNCHRONOUS:
            raise UsageError(f"--staleness: with --policy {ASYNCHRONOUS} only")
        if "--quorum" in given and self.policy.value in (SEQUENTIAL, ASYNCHRONOUS):
            raise UsageError(
                f"--quorum: with policies that join several clients in a round only; in a round of "
                f"{self.policy.value} there is one"
            )
        return PolicyOptions(
            name=self.policy.value,
            clients_min=self.clients_min,
            quorum=self.quorum,
            round_timeout=self.round_timeout,
            local_steps=self.local_steps,
            rounds=self.rounds,
            staleness=self.staleness,
        )
