"""The terms of a policy say by default that clients share nothing."""

from __future__ import annotations

from splitonnx.runtime.server.policies.terms import Terms


def test_without_more_clients_share_nothing() -> None:
    assert Terms(policy="per-client") == Terms(policy="per-client", local_steps=0, rounds=0)
