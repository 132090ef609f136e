"""The phases of a step of micro-batches share the graphs of an ordinary step."""

from __future__ import annotations

import pytest

from splitonnx.bundles import PartyBundle
from splitonnx.losses import FROM_FILE, Loss
from splitonnx.manifests import Source, WireKind
from splitonnx.names import Target
from splitonnx.optimizers import SGD, AdamW
from splitonnx.partitioner.differentiation.micro_batches import explain_unweighable
from splitonnx.partitioner.partitions import cut
from tests.support.zoo import ZOO

NEW = {"accumulate.onnx", "gradients.onnx", "confirm.onnx", "weigh.onnx"}


@pytest.mark.parametrize("target", ["training", "portable"])
def test_only_small_graphs_are_new(target: Target) -> None:
    bundle = cut(
        ZOO["chain"].build(),
        at="act0",
        tail_at="act2",
        optimizer=AdamW(clip_norm=1.0),
        client_target=target,
        server_target=target,
    )
    for party in bundle.parties.values():
        phases = {phase.name: phase for phase in party.manifest.phases}
        trained = {stage.graph for stage in phases["train"].stages}
        used = {s.graph for name in ("accumulate", "update") for s in phases[name].stages}
        assert trained <= used
        assert used - trained <= NEW


def list_accumulated(party: PartyBundle) -> set[str]:
    (stage,) = (s for s in party.manifest.phase("accumulate").stages if s.name == "accumulate")
    return {each.name for each in stage.inputs if each.source is Source.STATE}


def test_each_trained_parameter_has_a_sum_of_its_gradients() -> None:
    bundle = cut(ZOO["chain"].build(), at="act0")
    for party in bundle.parties.values():
        parameters = {s.tensor.name for s in party.manifest.state if s.role == "parameter"}
        assert {spec.name for spec in party.manifest.accumulators} == list_accumulated(party)
        assert list_accumulated(party) == {f"{name}#gradient" for name in parameters}
        assert not list_accumulated(party) & {s.tensor.name for s in party.manifest.state}


def test_the_client_tells_the_weight_and_the_server_confirms() -> None:
    bundle = cut(ZOO["chain"].build(), at="act0", optimizer=SGD(clip_norm=1.0))
    assert bundle.server is not None
    for party in bundle.parties.values():
        wires = party.manifest.phase("accumulate").wires
        assert [w.tensor.name for w in wires if w.kind is WireKind.COUNT] == ["splitonnx.weight"]
        assert not [w for w in wires if w.kind is WireKind.NORM]
        ends = [wire.tensor.name for wire in party.manifest.phase("update").wires]
        assert ends[0] == "splitonnx.micro_batches"
        assert ends[-1] == "splitonnx.confirmed"
    (confirm,) = (s for s in bundle.server.manifest.phase("update").stages if s.name == "confirm")
    # it waits for the client's last message
    assert [each.name for each in confirm.inputs] == [
        "splitonnx.micro_batches",
        "splitonnx.norms.client",
    ]


@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_the_server_confirms_before_it_updates(clip_norm: float | None) -> None:
    bundle = cut(ZOO["chain"].build(), at="act0", optimizer=SGD(clip_norm=clip_norm))
    assert bundle.server is not None
    stages = [stage.name for stage in bundle.server.manifest.phase("update").stages]
    sends_norms = ["norms"] if clip_norm else []
    assert stages == ["gradients", *sends_norms, "confirm", "update"]


def test_a_server_that_trains_nothing_is_told_no_weight() -> None:
    bundle = cut(ZOO["chain"].build(), at="act0", tail_at="act2", freeze=["w1", "b1", "w2", "b2"])
    assert bundle.server is not None
    trained = [s for s in bundle.server.manifest.state if s.role == "parameter"]
    kinds = [wire.kind for wire in bundle.client.manifest.phase("accumulate").wires]
    assert (WireKind.COUNT in kinds) == bool(trained)


@pytest.mark.parametrize(
    ("losses", "is_private", "reason"),
    [
        ([Loss()], True, ""),
        ([Loss(ignore_index=-1, class_weights=(1.0, 0.0))], False, ""),
        ([Loss(kind="from-model")], False, "by the model or by a file"),
        ([Loss(), Loss(kind=FROM_FILE, graph=b"")], False, "by the model or by a file"),
        ([Loss(label_smoothing=0.1, class_weights=(1.0, 0.0))], False, "a class of weight 0"),
        ([Loss(), Loss(sample_weights="w")], True, "would tell the server something"),
    ],
)
def test_what_cannot_be_weighed_is_said_with_its_reason(
    losses: list[Loss], is_private: bool, reason: str
) -> None:
    found = explain_unweighable(losses, is_private=is_private)
    assert (reason in found) if reason else not found


def test_a_bundle_that_cannot_accumulate_says_why_and_has_no_such_phases() -> None:
    loss = Loss(ignore_index=-1)
    bundle = cut(ZOO["chain"].build(), at="act0", tail_at="act2", loss=loss)
    assert "would tell the server something" in bundle.client.manifest.unweighable
    for party in bundle.parties.values():
        names = {phase.name for phase in party.manifest.phases}
        assert not names & {"accumulate", "update", "weigh"}
        assert party.manifest.accumulators == ()
