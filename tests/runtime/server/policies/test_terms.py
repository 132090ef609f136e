"""The terms of a policy say by default that clients share nothing."""

from __future__ import annotations

import msgspec
import pytest

from splitonnx.errors import RemoteProtocolError
from splitonnx.manifests import PartyManifest, Phase, Source, Wire, WireKind
from splitonnx.micro_batches import MOST_IN_FLIGHT
from splitonnx.names import SERVER
from splitonnx.partitioner.partitions import cut
from splitonnx.runtime.server.policies.terms import Terms
from splitonnx.tensors import TensorSpec
from tests.support import tiny
from tests.support.zoo import ZOO


def test_without_more_clients_share_nothing() -> None:
    assert Terms(policy="per-client") == Terms(policy="per-client", local_steps=0, rounds=0)


def test_it_is_said_what_clients_share() -> None:
    assert Terms(policy="per-client").describe() == ()
    assert Terms(policy="splitfed-v1", local_steps=4, rounds=9).describe() == (
        "policy 'splitfed-v1': after every 4 steps, for 9 rounds, each client also sends the "
        "trained weights and statistics of its part",
    )


@pytest.mark.parametrize(
    "policy",
    ["per-client", "sequential", "splitfed-v1", "splitfed-v2", "synchronous", "asynchronous"],
)
def test_steps_may_consist_of_micro_batches(policy: str) -> None:
    terms, manifest = Terms(policy=policy), cut(ZOO["chain"].build(), at="act1").parties[SERVER]
    assert terms.can_accumulate(manifest.manifest)
    terms.check("accumulate", manifest.manifest)


def test_a_joint_step_takes_no_micro_batches_without_weights_even_if_they_are_sent() -> None:
    terms = Terms(policy="synchronous", local_steps=1)
    bundle = cut(ZOO["chain"].build(), at="act1", freeze=("^(w|b)[234]$",))
    manifest = bundle.parties[SERVER].manifest
    assert not terms.can_accumulate(manifest)
    terms.check("train", manifest)
    for phase in ("accumulate", "update"):
        with pytest.raises(RemoteProtocolError, match=f"does not let it {phase}"):
            terms.check(phase, manifest)


def declare(*, is_late: bool) -> PartyManifest:
    """Declare a part that reads a state before it has all that it needs to change it, if late."""
    reader = tiny.make_stage("forward", {"x": Source.WIRE, "mean": Source.STATE}, ("y", "early"))
    changer = tiny.make_stage("backward", {"y.grad": Source.WIRE}, ("late",))
    wires = tuple(
        Wire(
            tensor=TensorSpec(name=name, dtype="F32", shape=()),
            sender="client",
            receiver="server",
            kind=WireKind.ACTIVATION,
        )
        for name in ("x", "y.grad")
    )
    phase = Phase(
        name="accumulate",
        stages=(reader, changer),
        wires=wires,
        commits={"mean": "late" if is_late else "early"},
    )
    manifest = tiny.split_bundle().parties["server"].manifest
    return msgspec.structs.replace(manifest, phases=(phase,))


@pytest.mark.parametrize("policy", ["per-client", "sequential", "splitfed-v1"])
def test_a_model_of_its_own_has_several_micro_batches_open_if_they_can_overlap(policy: str) -> None:
    assert Terms(policy=policy).count_in_flight(declare(is_late=False)) == MOST_IN_FLIGHT
    assert Terms(policy=policy).count_in_flight(declare(is_late=True)) == 1


@pytest.mark.parametrize("policy", ["splitfed-v2", "synchronous", "asynchronous"])
def test_one_model_for_all_runs_one_task_at_a_time(policy: str) -> None:
    assert Terms(policy=policy).count_in_flight(declare(is_late=False)) == 1
