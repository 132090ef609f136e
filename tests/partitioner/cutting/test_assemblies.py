"""Bundles put together: each party's stages, sources, state and checksums as the manifest says."""

from __future__ import annotations

import hashlib

import numpy as np
import onnx
import pytest

from splitonnx.bundles import Bundle, PartyBundle
from splitonnx.manifests import LEARNING_RATE, STEP, Role, Source, WireKind
from splitonnx.optimizers import SGD, AdamW
from splitonnx.partitioner.partitions import cut
from tests.support.zoo import ZOO


def cut_chain(**settings: object) -> Bundle:
    settings = {"at": "act1", **settings}
    return cut(ZOO["chain"].build(), **settings)  # type: ignore[arg-type]


def list_stages(party: PartyBundle | None, phase: str) -> list[str]:
    assert party is not None
    return [stage.name for stage in party.manifest.phase(phase).stages]


def test_stages_are_named_after_what_they_do() -> None:
    vanilla = cut_chain()
    assert list_stages(vanilla.client, "train") == ["head.forward", "head.backward", "update"]
    assert list_stages(vanilla.server, "train") == ["body.step", "update"]
    u_shaped = cut_chain(at="act0", tail_at="act1")
    assert list_stages(u_shaped.client, "train") == [
        "head.forward", "tail.step", "head.backward", "update",
    ]  # fmt: skip
    assert list_stages(u_shaped.server, "train") == ["body.forward", "body.backward", "update"]
    assert list_stages(u_shaped.client, "predict") == ["head.predict", "tail.predict"]
    whole = cut_chain(at=None)
    assert list_stages(whole.client, "train") == ["model.step", "update"]
    assert whole.server is None


def test_the_client_alone_evaluates() -> None:
    bundle = cut_chain()
    assert bundle.server is not None
    assert list_stages(bundle.client, "evaluate") == ["evaluate"]
    assert "evaluate" not in [phase.name for phase in bundle.server.manifest.phases]
    assert bundle.server.manifest.phase("train").results == ()


@pytest.mark.parametrize("target", ["training", "portable"])
def test_every_input_of_a_stage_has_a_source_that_has_it(target: str) -> None:
    bundle = cut_chain(at="act0", tail_at="act2", client_target=target, server_target=target)
    for party in bundle.parties.values():
        state = {spec.tensor.name for spec in party.manifest.state}
        state |= {spec.name for spec in party.manifest.accumulators}
        for phase in party.manifest.phases:
            data = {spec.name for spec in phase.data}
            received = {w.tensor.name for w in phase.wires if w.receiver == party.manifest.party}
            held = {
                Source.STATE: state, Source.DATA: data, Source.WIRE: received,
                Source.SCALAR: {LEARNING_RATE, STEP},
            }  # fmt: skip
            stash: set[str] = set()
            for stage in phase.stages:
                for each in stage.inputs:
                    assert each.name in held.get(each.source, stash), (stage.name, each)
                stash.update(stage.outputs)
            assert set(phase.commits.values()) <= stash | data | received
            assert set(phase.commits) <= state


def test_the_graphs_are_valid_and_are_what_the_manifest_says_of_them() -> None:
    for party in cut_chain(client_target="portable", server_target="portable").parties.values():
        assert party.manifest.files == {
            name: hashlib.sha256(graph).hexdigest() for name, graph in party.graphs.items()
        }
        stages = {s.graph: s for phase in party.manifest.phases for s in phase.stages}
        assert stages.keys() == party.graphs.keys()
        for name, content in party.graphs.items():
            model = onnx.ModelProto.FromString(content)
            onnx.checker.check_model(model)
            assert [v.name for v in model.graph.input] == [i.name for i in stages[name].inputs]
            assert [v.name for v in model.graph.output] == [*stages[name].outputs]


def test_only_the_training_target_has_operators_of_its_own() -> None:
    bundle = cut_chain(client_target="portable", server_target="training")
    domains = {}
    for name, party in bundle.parties.items():
        models = [onnx.ModelProto.FromString(graph) for graph in party.graphs.values()]
        domains[name] = {e.domain for model in models for e in model.opset_import}
    assert domains["client"] == {""}
    assert "com.microsoft" in domains["server"]


def test_each_party_holds_its_own_weights_and_nothing_else() -> None:
    bundle = cut_chain()
    assert bundle.server is not None
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in ZOO["chain"].build().graph.initializer}
    assert set(bundle.client.weights) == {"w0", "b0", "w1", "b1"}
    assert set(bundle.client.weights) | set(bundle.server.weights) == set(stored)
    assert not set(bundle.client.weights) & set(bundle.server.weights)
    for party in bundle.parties.values():
        for name, array in party.weights.items():
            np.testing.assert_array_equal(array, stored[name])


def test_roles_are_those_of_training() -> None:
    bundle = cut_chain(freeze=["^w1$"], optimizer=AdamW(lr=0.25))
    roles = {spec.tensor.name: spec.role for spec in bundle.client.manifest.state}
    assert roles["w0"] is Role.PARAMETER
    assert roles["w1"] is Role.FROZEN
    assert roles["w0#exp_avg"] is Role.OPTIMIZER
    assert "w1#exp_avg" not in roles
    assert bundle.client.manifest.learning_rate == 0.25


def test_clipping_makes_the_parties_exchange_norms() -> None:
    bundle = cut_chain(optimizer=SGD(lr=0.1, clip_norm=1.0))
    assert bundle.server is not None
    for party in (bundle.client, bundle.server):
        assert list_stages(party, "train")[-2:] == ["norms", "update"]
        norms = [w for w in party.manifest.phase("train").wires if w.kind is WireKind.NORM]
        assert {(w.sender, w.receiver, w.tensor.shape) for w in norms} == {
            ("client", "server", (4,)), ("server", "client", (6,)),
        }  # fmt: skip


def test_the_same_model_gives_the_same_bundle_and_another_one_another() -> None:
    first, second = cut_chain(), cut_chain()
    assert first.manifest.digest == second.manifest.digest
    assert first.skeleton == second.skeleton
    for name, party in first.parties.items():
        assert party.graphs == second.parties[name].graphs
        assert party.manifest.digest == first.manifest.digest
    assert cut_chain(at="act2").manifest.digest != first.manifest.digest
    model = ZOO["chain"].build()
    changed = onnx.numpy_helper.to_array(model.graph.initializer[0]) + np.float32(1e-3)
    model.graph.initializer[0].CopyFrom(
        onnx.numpy_helper.from_array(changed, model.graph.initializer[0].name)
    )
    assert cut(model, at="act1").manifest.digest != first.manifest.digest


def test_the_skeleton_has_the_outputs_and_none_of_the_weights() -> None:
    model = onnx.ModelProto.FromString(cut_chain().skeleton)
    assert [v.name for v in model.graph.output] == [
        v.name for v in ZOO["chain"].build().graph.output
    ]
    assert not {t.name for t in model.graph.initializer} & {"w0", "w4"}
