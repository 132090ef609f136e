"""The terms of a policy say by default that clients share nothing."""

from __future__ import annotations

import pytest

from splitonnx.errors import RemoteProtocolError
from splitonnx.runtime.server.policies.terms import Terms


def test_without_more_clients_share_nothing() -> None:
    assert Terms(policy="per-client") == Terms(policy="per-client", local_steps=0, rounds=0)


def test_it_is_said_what_clients_share() -> None:
    assert Terms(policy="per-client").describe() == ()
    assert Terms(policy="splitfed-v1", local_steps=4, rounds=9).describe() == (
        "policy 'splitfed-v1': after every 4 steps, for 9 rounds, each client also sends the "
        "trained weights and statistics of its part",
    )


@pytest.mark.parametrize("policy", ["per-client", "sequential", "splitfed-v1"])
def test_a_model_of_its_own_accumulates_a_clients_micro_batches(policy: str) -> None:
    terms = Terms(policy=policy)
    assert terms.can_accumulate
    terms.check("accumulate")


@pytest.mark.parametrize("policy", ["splitfed-v2", "synchronous", "asynchronous"])
def test_one_model_for_all_takes_no_micro_batches_even_if_they_are_sent(policy: str) -> None:
    terms = Terms(policy=policy, local_steps=1)
    assert not terms.can_accumulate
    terms.check("train")
    for phase in ("accumulate", "update"):
        with pytest.raises(RemoteProtocolError, match=f"does not let it {phase}"):
            terms.check(phase)
