"""The phase in which clients share parameters is declared alike for both parties."""

from __future__ import annotations

import pytest

from splitonnx.manifests import FORMAT, PartyManifest, Phase, Role, StateSpec, WireKind
from splitonnx.names import CLIENT, SERVER, SHARE
from splitonnx.sharing import (
    LEAVES,
    ROUND,
    SAMPLES,
    declare_sharing,
    list_joined,
    name_joined,
    name_own,
)
from splitonnx.tensors import TensorSpec


def _manifest(party: str, *state: StateSpec) -> PartyManifest:
    return PartyManifest(
        format=FORMAT,
        party=party,
        digest="",
        target="training",
        phases=(Phase(name="train"),),
        state=state,
        files={},
        learning_rate=0.1,
    )


def _state(name: str, role: Role, dtype: str = "F32") -> StateSpec:
    return StateSpec(tensor=TensorSpec(name=name, dtype=dtype, shape=(2, 3)), role=role)


@pytest.fixture(scope="module")
def shared() -> dict[str, PartyManifest]:
    client = _manifest(
        CLIENT,
        _state("w", Role.PARAMETER),
        _state("mean", Role.BUFFER),
        _state("count", Role.BUFFER, "I64"),
        _state("hidden", Role.BUFFER),
        _state("fixed", Role.FROZEN),
        _state("w.momentum", Role.OPTIMIZER),
    )
    server = _manifest(SERVER, _state("v", Role.PARAMETER))
    return declare_sharing({CLIENT: client, SERVER: server}, ["hidden"])


def test_a_client_shares_floats_that_training_changes_and_no_state_made_of_its_data(
    shared: dict[str, PartyManifest],
) -> None:
    assert list_joined(shared[CLIENT]) == ("w", "mean")
    sent = [w.tensor.name for w in shared[CLIENT].phase(SHARE).wires if w.sender == CLIENT]
    assert sent == [SAMPLES, LEAVES, name_own("w"), name_own("mean")]


def test_both_parties_declare_the_same_wires(shared: dict[str, PartyManifest]) -> None:
    client, server = (shared[party].phase(SHARE) for party in (CLIENT, SERVER))
    assert client.wires == server.wires
    assert {wire.kind for wire in client.wires} == {WireKind.PARAMETER}
    received = [w.tensor.name for w in client.wires if w.receiver == CLIENT]
    assert received == [ROUND, name_joined("w"), name_joined("mean")]


def test_each_party_replaces_its_own_tensors(shared: dict[str, PartyManifest]) -> None:
    client, server = (shared[party].phase(SHARE) for party in (CLIENT, SERVER))
    assert client.commits == {"w": name_joined("w"), "mean": name_joined("mean")}
    assert server.commits == {"v": name_joined("v")}
    assert {spec.name for spec in server.data} == {
        ROUND, *(name_joined(name) for name in ("w", "mean", "v"))
    }  # fmt: skip


def test_an_unsplit_model_shares_nothing() -> None:
    whole = {CLIENT: _manifest(CLIENT, _state("w", Role.PARAMETER))}
    assert declare_sharing(whole, []) == whole
    assert list_joined(whole[CLIENT]) == ()
