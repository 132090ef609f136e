"""What is listed beside raw inputs that may cross is what a cut takes together with them."""

from __future__ import annotations

import random

import onnx_ir as ir
import pytest

from splitonnx.errors import CutError, SplitonnxError
from splitonnx.partitioner.cutting.candidates.bisections import find_bisections
from splitonnx.partitioner.cutting.cuts import divide, survey
from splitonnx.partitioner.cutting.preparations import prepare
from splitonnx.partitioner.gate.gates import open_model
from splitonnx.partitioner.inference.folds import note_shapes
from splitonnx.partitioner.partitions import cut
from splitonnx.partitioner.reports.inspections import inspect, list_cuts
from tests.partitioner.cutting.candidates.test_bisections import build_random
from tests.support.zoo import ZOO


def list_partners(
    graph: ir.Graph, sent: ir.Value, state: set[str], trainable: set[str]
) -> list[str]:
    """Try every tensor together with ``sent``."""
    around = survey(graph, state=state, trainable=trainable)
    taken = []
    for value in (value for node in graph for value in node.outputs):
        try:
            divide(graph, [value, sent], state=state, trainable=trainable, around=around)
        except CutError:
            continue
        taken.append(value.name or "")
    return taken


@pytest.mark.parametrize("name", ZOO)
def test_every_partner_of_a_raw_input_is_listed(name: str) -> None:
    prepared = prepare(open_model(ZOO[name].build().SerializeToString()))
    graph = prepared.inference.graph
    state, trainable = set(prepared.state), set(prepared.trainable)
    for value in list(survey(graph, state=state, trainable=trainable).raw):
        listed = [
            each.tensor for each in list_cuts(prepared, None, [value.name or ""]) if each.sent
        ]
        assert listed == list_partners(graph, value, state, trainable)


@pytest.mark.parametrize("name", ["attention", "two_inputs"])
def test_the_models_that_have_partners_keep_some(name: str) -> None:
    model = ZOO[name].build()
    for value in ZOO[name].inputs:
        assert [each for each in inspect(model, sent=[value]) if each.sent]


@pytest.mark.parametrize("sent", ["a", "b"])
def test_what_is_listed_beside_an_input_is_what_cut_takes(sent: str) -> None:
    model, loss = ZOO["two_inputs"].build(), ZOO["two_inputs"].loss
    listed = {each.tensor for each in inspect(model, sent=[sent]) if each.sent == (sent,)}
    taken = set()
    for tensor in (tensor for node in model.graph.node for tensor in node.output):
        try:
            cut(model, at=[tensor, sent], loss=loss)
        except SplitonnxError:
            continue
        taken.add(tensor)
    assert listed == taken == ({"mb", "rb"} if sent == "a" else {"ma", "ta"})


@pytest.mark.parametrize("seed", range(120))
def test_in_any_graph_a_tensor_alone_or_beside_the_input_is_listed(seed: int) -> None:
    choice = random.Random(seed)
    graph, data, weights = build_random(choice)
    note_shapes(graph)
    state = {value.name or "" for value in weights}
    trained = {name: 3 for name in sorted(state) if choice.random() < 0.8}
    sent = data[0]
    found = find_bisections(graph, state=state, trainable=trained, sent=[sent])
    alone = find_bisections(graph, state=state, trainable=trained)
    single = {each.at[0].name for each in alone}
    partners = set(list_partners(graph, sent, state, set(trained)))
    listed = {each.at[0].name for each in found if len(each.at) > 1}
    assert {each.at[0].name for each in found if len(each.at) == 1} == single
    assert listed == partners - single
