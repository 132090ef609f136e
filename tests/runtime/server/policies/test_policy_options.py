"""The options of a policy are checked, and say what clients are told."""

from __future__ import annotations

import pytest

from splitonnx.errors import UsageError
from splitonnx.runtime.server.policies.policy_options import POLICIES, PolicyOptions
from splitonnx.runtime.server.policies.terms import Terms


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"name": "fedavg"}, "there is no policy 'fedavg'; take one of per-client, sequential"),
        ({"clients_min": 0}, "clients_min must be at least 1, not 0"),
        ({"quorum": 0}, "quorum must be at least 1, not 0"),
        ({"local_steps": 0}, "local_steps must be at least 1, not 0"),
        ({"rounds": -1}, "rounds must be at least 0, not -1"),
        ({"staleness": -1}, "staleness must be at least 0, not -1"),
        ({"round_timeout": 0.0}, "round_timeout must be above 0 seconds, not 0"),
        ({"round_timeout": float("nan")}, "round_timeout must be above 0 seconds, not nan"),
    ],
)
def test_what_is_out_of_range_is_refused(options: dict[str, object], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        PolicyOptions(**options)  # type: ignore[arg-type]


def test_clients_are_told_of_local_steps_only_where_they_share() -> None:
    for name in POLICIES:
        terms = PolicyOptions(name=name, local_steps=4, rounds=2).terms
        expected = (0, 0) if name == "per-client" else (4, 2)
        assert terms == Terms(policy=name, local_steps=expected[0], rounds=expected[1])
