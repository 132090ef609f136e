"""The terms of a policy say by default that clients share nothing."""

from __future__ import annotations

from splitonnx.runtime.server.policies.terms import Terms


def test_without_more_clients_share_nothing() -> None:
    assert Terms(policy="per-client") == Terms(policy="per-client", local_steps=0, rounds=0)


def test_it_is_said_what_clients_share() -> None:
    assert Terms(policy="per-client").describe() == ()
    assert Terms(policy="splitfed-v1", local_steps=4, rounds=9).describe() == (
        "policy 'splitfed-v1': after every 4 steps, for 9 rounds, each client also sends the "
        "trained weights and statistics of its part",
    )
