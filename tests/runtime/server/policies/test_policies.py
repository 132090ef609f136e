"""Every policy can be asked what a session asks."""

from __future__ import annotations

import inspect

import pytest

from splitonnx.runtime.server.policies.joint_training import JointTraining
from splitonnx.runtime.server.policies.per_client import PerClient
from splitonnx.runtime.server.policies.policies import Policy

POLICIES: list[type[Policy]] = [PerClient, JointTraining]


@pytest.mark.parametrize("policy", POLICIES)
def test_a_policy_takes_what_the_interface_names(policy: type[Policy]) -> None:
    asked = {name for name in vars(Policy) if not name.startswith("_")}
    assert asked >= {"join", "submit", "leave", "tick"}
    for name in asked:
        wanted = inspect.signature(getattr(Policy, name))
        assert inspect.signature(getattr(policy, name)).parameters == wanted.parameters
