"""The options of ``serve`` for its policy, and what they are refused with."""

from __future__ import annotations

from pathlib import Path

import pytest

from splitonnx.commands.policies import JoiningOptions, PolicyName
from splitonnx.runtime.server.policies.policy_options import POLICIES, PolicyOptions
from tests.support import tiny
from tests.support.commands import Command


def test_there_is_a_name_for_each_policy() -> None:
    assert tuple(name.value for name in PolicyName) == POLICIES


def test_without_options_nothing_is_joined() -> None:
    assert JoiningOptions().read() == PolicyOptions()


def test_each_option_reaches_the_policy() -> None:
    given = JoiningOptions(
        policy=PolicyName.SPLITFED_V1,
        local_steps=5,
        rounds=6,
        clients_min=3,
        quorum=2,
        round_timeout=7.5,
    )
    assert given.read() == PolicyOptions(
        name="splitfed-v1",
        local_steps=5,
        rounds=6,
        clients_min=3,
        quorum=2,
        round_timeout=7.5,
    )
    given = JoiningOptions(policy=PolicyName.ASYNCHRONOUS, staleness=0)
    assert given.read() == PolicyOptions(name="asynchronous", staleness=0)


@pytest.mark.parametrize("name", [name for name in PolicyName if name != PolicyName.ASYNCHRONOUS])
def test_staleness_is_for_the_policy_asynchronous_alone(
    command: Command, tmp_path: Path, name: PolicyName
) -> None:
    tiny.split_bundle().save(tmp_path / "bundle")
    server = tmp_path / "bundle" / "server"
    told = command.fail("serve", server, "--policy", name.value, "--staleness", 2)
    assert "--staleness: with " in told
    assert ("--policy asynchronous only" in told) == (name is not PolicyName.PER_CLIENT)


@pytest.mark.parametrize(
    ("option", "value"),
    [("--local-steps", 2), ("--rounds", 3), ("--clients-min", 2), ("--quorum", 2),
     ("--round-timeout", 9), ("--staleness", 1)],
)  # fmt: skip
def test_an_option_that_the_policy_does_not_have_is_refused(
    command: Command, tmp_path: Path, option: str, value: int
) -> None:
    tiny.split_bundle().save(tmp_path / "bundle")
    told = command.fail("serve", tmp_path / "bundle" / "server", option, value)
    assert f"{option}: with a policy that joins clients only" in told


@pytest.mark.parametrize("name", ["sequential", "asynchronous"])
def test_where_a_round_has_one_client_there_is_no_quorum(
    command: Command, tmp_path: Path, name: str
) -> None:
    tiny.split_bundle().save(tmp_path / "bundle")
    told = command.fail("serve", tmp_path / "bundle" / "server", "--policy", name, "--quorum", 2)
    assert "--quorum: with policies that join several clients in a round only" in told
    assert f"in a round of {name} there is one" in told


def test_a_bundle_of_an_earlier_version_is_refused(command: Command, tmp_path: Path) -> None:
    tiny.split_bundle().save(tmp_path / "bundle")
    told = command.fail(
        "serve", tmp_path / "bundle" / "server", "--policy", "splitfed-v1", "--port", 0
    )
    assert "cut the model again with this version" in told
