"""Which stages run again in whose part, what they hand on, and what is refused."""

from __future__ import annotations

import pytest

from splitonnx.bundles import Bundle, PartyBundle
from splitonnx.errors import UsageError
from splitonnx.manifests import Phase, Stage, WireKind
from splitonnx.names import ACCUMULATE, PREDICT, TRAIN, Recompute
from splitonnx.partitioner.cutting.transforms.crossings import encode_crossings
from splitonnx.partitioner.cutting.transforms.recomputations import recompute_stages
from splitonnx.partitioner.partitions import cut
from splitonnx.wire_codecs import read_wire
from tests.support.zoo import ZOO

U_SHAPED = ("r1", "flat")


def make(at: str | None = "r1", tail_at: str | tuple[str, ...] = ()) -> Bundle:
    entry = ZOO["convolutions"]
    return cut(entry.build(), at=at, tail_at=tail_at, loss=entry.loss, check=False)


def get_stages(party: PartyBundle | None, phase: str = TRAIN) -> dict[str, Stage]:
    assert party is not None
    return {stage.name: stage for stage in party.manifest.phase(phase).stages}


def list_kept(phase: Phase, stages: dict[str, Stage]) -> set[str]:
    """List what a head hands on besides what is sent and what replaces state."""
    sent = {wire.tensor.name for wire in phase.wires}
    return set(stages["head.forward"].outputs) - sent - set(phase.commits.values())


@pytest.mark.parametrize("phase", [TRAIN, ACCUMULATE])
def test_the_head_runs_again_once_the_gradient_is_there_and_keeps_nothing_until_then(
    phase: str,
) -> None:
    plain, made = make(), recompute_stages(make(), "client")
    before = get_stages(plain.client, phase)
    stages = get_stages(made.client, phase)
    assert list(stages)[:3] == ["head.forward", "head.recompute", "head.backward"]
    again = stages["head.recompute"]
    received = [
        wire.tensor.name
        for wire in made.client.manifest.phase(phase).wires
        if wire.kind is WireKind.GRADIENT
    ]
    assert list(again.awaited) == received == ["r1@server_grad"]
    assert (again.graph, again.inputs) == ("head.forward.onnx", before["head.forward"].inputs)
    assert list_kept(plain.client.manifest.phase(phase), before) == set(again.outputs) != set()
    assert not list_kept(made.client.manifest.phase(phase), stages)
    assert stages["head.backward"] == before["head.backward"]
    assert made.client.graphs == plain.client.graphs
    assert all(not stage.awaited for name, stage in stages.items() if name != "head.recompute")


@pytest.mark.parametrize(
    ("recompute", "parties"),
    [("client", {"client"}), ("server", {"server"}), ("both", {"client", "server"})],
)
def test_only_the_part_that_was_named_computes_again(
    recompute: Recompute, parties: set[str]
) -> None:
    made = recompute_stages(make(*U_SHAPED), recompute)
    found = {
        name
        for name, party in made.parties.items()
        if any(stage.awaited for stage in party.manifest.phase(TRAIN).stages)
    }
    assert found == parties
    assert made.manifest.recipe.recompute == tuple(sorted(parties))


def test_true_is_both_and_false_is_neither() -> None:
    plain = make(*U_SHAPED)
    assert recompute_stages(plain, True) == recompute_stages(plain, "both")
    assert recompute_stages(plain, False) is plain


def test_both_is_whoever_has_something_to_compute_again() -> None:
    made = recompute_stages(make(), "both")
    assert made.manifest.recipe.recompute == ("client",)
    assert made.server is not None
    assert all(not s.awaited for phase in made.server.manifest.phases for s in phase.stages)


def test_a_bundle_that_computes_again_is_another_bundle() -> None:
    plain, made = make(), recompute_stages(make(), "client")
    digests = {party.manifest.digest for party in made.parties.values()}
    assert digests == {made.manifest.digest} != {plain.manifest.digest}
    predict = [b.client.manifest.phase(PREDICT) for b in (plain, made)]
    assert predict[0] == predict[1]


def test_what_was_decoded_to_compute_forward_is_decoded_again() -> None:
    made = recompute_stages(encode_crossings(make(*U_SHAPED), read_wire("int8")), "server")
    stages = get_stages(made.server)
    assert list(stages)[:6] == [
        "body.forward.decode",
        "body.forward",
        "body.backward.decode",
        "body.recompute.decode",
        "body.recompute",
        "body.backward",
    ]
    assert stages["body.recompute.decode"].outputs == ("r1@server",)
    assert stages["body.recompute"].awaited == ("flat@client_grad",)  # as it was decoded


@pytest.mark.parametrize(
    ("at", "tail_at", "recompute", "message"),
    [
        (None, (), "client", r"--recompute client: the model is not cut.*leave it out"),
        ("r1", (), "server", r"--recompute server: in a cut without --tail-at.*choose client"),
    ],
)
def test_a_part_that_keeps_nothing_is_refused(
    at: str | None, tail_at: tuple[str, ...], recompute: Recompute, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        recompute_stages(make(at, tail_at), recompute)


def test_a_head_that_is_not_trained_keeps_nothing_either() -> None:
    entry = ZOO["convolutions"]
    freeze = ["^(w1|b1)$"]
    frozen = cut(entry.build(), at="r1", loss=entry.loss, freeze=freeze, check=False)
    assert [s.name for s in frozen.client.manifest.phase(TRAIN).stages] == ["head.forward"]
    with pytest.raises(UsageError, match=r"the client's part keeps nothing .* leave it out"):
        recompute_stages(frozen, "client")


def test_no_other_party_can_be_named() -> None:
    with pytest.raises(UsageError, match=r"client, server, both or a bool, not 'head'"):
        recompute_stages(make(), "head")  # type: ignore[arg-type]
